"""Imports follow the data's one way, and `import t5fx` stays light."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The order: a module may import those above it. A name stands for itself and, unless a longer name
# is listed too, for everything under it; files of one folder may import each other.
ORDER = [
    "t5fx.errors",
    "t5fx.versions",
    "t5fx.tables",
    "t5fx.digest",
    "t5fx.atomic",
    "t5fx.cache",
    "t5fx.config",
    "t5fx.reports",
    "t5fx.hooks",
    "t5fx.wrappers",
    "t5fx.checkpoint.description",
    "t5fx.checkpoint.files",
    "t5fx.graph",
    "t5fx.analysis.masks",
    "t5fx.analysis.key_masks",
    "t5fx.patterns.base",
    "t5fx.patterns.operands",
    "t5fx.patterns.chains",
    "t5fx.patterns",  # a pattern each
    "t5fx.frontend",
    "t5fx.analysis.match",
    "t5fx.analysis.opaque",
    "t5fx.analysis.axis",
    "t5fx.analysis.tokens",
    "t5fx.analysis.packed",
    "t5fx.analysis.meaning",
    "t5fx.analysis.rules_compute",
    "t5fx.analysis.rules_cut",
    "t5fx.analysis.rules_shape",
    "t5fx.analysis.layout",
    "t5fx.kernels",  # policy asks what a node costs; nothing before it knows of the node
    "t5fx.analysis",
    "t5fx.rewrite",
    "t5fx.runtime",
    "t5fx.pipeline",
    "t5fx.backend",
    "t5fx.api",
    "t5fx.checkpoint",
    "t5fx.training",
    "t5fx.diagnostics",
    "t5fx",  # the public names, resolved on first use
    "t5fx.bench.harness",
    "t5fx.bench.report",
    "t5fx.bench.coverage",
    "t5fx.bench.demos",
    "t5fx.bench.suites",
    "t5fx.bench.gpu",
    "t5fx.bench.ablation",
    "t5fx.bench.diffusion",
    "t5fx.bench",
    "t5fx.cli",
    "t5fx.__main__",
]

# Stricter than the order: everything under the name imports nothing of ours but these places.
ONLY = {
    "t5fx.patterns": {
        *("t5fx.errors", "t5fx.graph", "t5fx.analysis.masks", "t5fx.analysis.key_masks"),
        *("t5fx.patterns.base", "t5fx.patterns.operands", "t5fx.patterns.chains"),
    },
    "t5fx.kernels": {"t5fx.errors", "t5fx.digest", "t5fx.cache", "t5fx.kernels"},
}


def _modules() -> dict[str, Path]:
    """Every module in the repository by its import name, as pyproject.toml maps the folders."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    found = {}
    for package, folder in setuptools["setuptools"]["package-dir"].items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = _modules()


def _place(module: str) -> str | None:
    """The entry of ORDER that a module belongs to."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        name = ".".join(parts[:n])
        if name in ORDER and (name != "t5fx" or module == "t5fx"):
            return name
    return None


def _imports(module: str, source: str, is_package: bool) -> set[str]:
    """The modules of t5fx that a source imports: at its top, in functions, for type checking."""
    package = module if is_package else module.rpartition(".")[0]
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                imported.add(submodule if submodule in MODULES else base)
    return {name for name in imported if name.split(".")[0] == "t5fx"}


def _violations(module: str, imported: set[str]) -> list[str]:
    here = _place(module)
    if here is None:
        return [f"{module} has no place in ORDER (tests/test_imports.py)"]
    allowed = next((ONLY[name] for name in ONLY if f"{module}.".startswith(f"{name}.")), None)
    found = []
    for name in sorted(imported - {module}):
        there = _place(name)
        if there is None:
            found.append(f"{module} imports {name}, which has no place in ORDER")
        elif ORDER.index(there) > ORDER.index(here):
            found.append(f"{module} imports {name}, which comes after it")
        elif allowed is not None and there not in allowed:
            found.append(f"{module} imports {name}; it may import {sorted(allowed)} only")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_order(module):
    path = MODULES[module]
    imported = _imports(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not _violations(module, imported)


def test_order_names_what_exists():
    assert set(ORDER) == {_place(module) for module in MODULES}


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("t5fx.analysis.match", "from t5fx.rewrite.sites import rewrite", "comes after it"),
        ("t5fx.analysis.match", "from . import rewrite", "comes after it"),
        ("t5fx.analysis.match", "def f():\n    import t5fx.api", "comes after it"),
        ("t5fx.analysis.match", "import t5fx", "comes after it"),
        ("t5fx.analysis.layout", "from t5fx.kernels import flops", "comes after it"),
        ("t5fx.patterns.sdpa", "from ..config import LinearizeConfig", "may import"),
        ("t5fx.patterns.sdpa", "from .softmax import other", "may import"),
        ("t5fx.kernels.inner.swiglu", "from t5fx.graph.view import x", "may import"),
        ("t5fx.novelty", "import torch", "no place in ORDER"),
        ("t5fx.analysis.match", "import t5fx.novelty", "no place in ORDER"),
        (
            "t5fx.analysis.match",
            "from ..patterns.base import Pattern\nfrom ..graph import view",
            None,
        ),
        ("t5fx.kernels.inner.swiglu", "from ..reference import f\nfrom . import x", None),
        ("t5fx.rewrite.sites", "from t5fx.kernels import op\nimport networkx", None),
    ],
)
def test_the_check_itself(module, source, complaint):
    violations = _violations(module, _imports(module, source, is_package=False))
    if complaint is None:
        assert not violations
    else:
        assert any(complaint in violation for violation in violations)


def _loaded_by(statement: str, after: str) -> set[str]:
    """The modules that a statement loads in a fresh interpreter on top of those of another one."""
    code = (
        f"import sys\n{after}\nbefore = set(sys.modules)\n{statement}\n"
        "print(*(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_t5fx_loads_little_beside_torch():
    loaded = _loaded_by("import t5fx", after="import torch")
    foreign = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - {"t5fx"}
    # torch.utils.flop_counter imports triton, and that Python's build settings.
    foreign = {name for name in foreign if not name.startswith("_sysconfigdata")}
    assert foreign <= {"torch", "triton"}
    heavy = {
        "sympy",
        "torch._dynamo",
        "torch._inductor",
        "torch.export",
        "torch.distributed",
        "t5fx.bench",
    }
    assert not loaded & heavy


def test_every_public_name_resolves():
    import t5fx

    assert t5fx.__all__
    for name in t5fx.__all__:
        assert getattr(t5fx, name) is not None
        assert name in dir(t5fx)
    with pytest.raises(AttributeError, match="no_such_name"):
        t5fx.no_such_name  # noqa: B018
