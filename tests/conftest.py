"""What every test gets: seeds, thread counts, Hypothesis profiles, and the `--core` option."""

import ast
import os
import sys
import tempfile
from pathlib import Path

# Before torch is imported. A cache of this run's own: Inductor's on-disk cache does not see that
# the fake implementation of an operator changed, and would hand back code for the old one.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _inductor_cache = tempfile.TemporaryDirectory(prefix="t5fx-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor_cache.name  # xdist's workers inherit it
if "T5FX_CACHE_DIR" not in os.environ:
    _costs = tempfile.TemporaryDirectory(prefix="t5fx-costs-")
    os.environ["T5FX_CACHE_DIR"] = _costs.name
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are built from their configurations

import hypothesis
import pytest
import torch

TESTS = Path(__file__).parent

# The libraries that the core tests may import; see `test-core` in pyproject.toml.
CORE_LIBRARIES = {
    "accelerate",
    "huggingface_hub",
    "hypothesis",
    "networkx",
    "numpy",
    "pytest",
    "rich",
    "safetensors",
    "t5fx",
    "t5fx_command",
    "torch",
    "triton",  # comes with torch
}

# The modules of t5fx.bench that import no more than that.
CORE_BENCH = tuple(
    f"t5fx.bench.gpu.{name}" for name in ("hazards", "interpreter", "offline", "races")
)


class _TorchRandom:
    """Hypothesis seeds torch's generator before each example, as it does Python's."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # Hypothesis keeps a weak reference only
hypothesis.register_random(_TORCH_RANDOM)

_COMMON = {
    "deadline": None,
    "suppress_health_check": [
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
    ],
}
hypothesis.settings.register_profile(
    "ci", max_examples=20, derandomize=True, print_blob=True, **_COMMON
)
hypothesis.settings.register_profile(
    "few", max_examples=5, derandomize=True, print_blob=True, **_COMMON
)
hypothesis.settings.register_profile("nightly", max_examples=300, print_blob=True, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--core",
        action="store_true",
        help="only the tests that need no library beyond " + ", ".join(sorted(CORE_LIBRARIES)),
    )


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))


def _imported(path: Path) -> set[str]:
    """The modules that a test file imports anywhere in it, through those of the tests too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    for name in list(names):
        file = f"{name.partition('.')[0]}.py"
        for neighbour in filter(Path.exists, (path.parent / file, TESTS / file)):
            names.remove(name)
            names |= _imported(neighbour)
            break
    return names


def needs_extras(path: Path) -> bool:
    """Whether a test file imports a library that is not a core one, or what of t5fx.bench does."""
    names = _imported(path)
    top = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    bench = {name for name in names if name.startswith("t5fx.bench.")} - {"t5fx.bench.gpu"}
    return bool(top - CORE_LIBRARIES or not all(name.startswith(CORE_BENCH) for name in bench))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--core") and collection_path.suffix == ".py":
        return needs_extras(collection_path) or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--core"):
        extras = [item for item in items if item.get_closest_marker("extras")]
        config.hook.pytest_deselected(items=extras)
        items[:] = [item for item in items if item not in extras]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """No test sees what an earlier one compiled, nor its recompile counts."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
