"""The wheel and the editable installation both hold the mapped folders; `kernels` is not ours."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import t5fx
from t5fx import digest

ROOT = Path(__file__).parent.parent
FOLDERS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
    "setuptools"
]["package-dir"]

# Imports every module of t5fx and says where each was found.
IMPORT_ALL = """
import importlib, json, pkgutil, sys
import t5fx
names = ["t5fx_command", "t5fx", "t5fx.bench", "t5fx.kernels", "t5fx.patterns"]
names += ["t5fx.kernels.cpp", "t5fx.kernels.triton_kernels"]
for name in names[1:]:
    package = importlib.import_module(name)
    names += [found.name for found in pkgutil.walk_packages(package.__path__, name + ".")]
names = [name for name in names if not name.endswith("__main__")]
json.dump({name: importlib.import_module(name).__file__ for name in names}, sys.stdout)
"""


def _run(*args: str | Path, cwd: Path, **env: str) -> str:
    run = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def _expected_files() -> dict[str, Path]:
    """Every Python file of the mapped folders by its path in the wheel."""
    files = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            where = Path(*package.split("."), path.relative_to(ROOT / folder))
            files[where.as_posix()] = path
    files["t5fx_command.py"] = ROOT / "t5fx_command.py"
    return files


def _expected_data() -> set[str]:
    """Everything else that the wheel holds, by its path in it."""
    weights = (ROOT / "bench").glob("*/weights/*")
    sources = (ROOT / "kernels" / "cpp").glob("*.[ch]*")
    return {
        "t5fx/py.typed",
        *(f"t5fx/{path.relative_to(ROOT)}" for path in weights),
        *(f"t5fx/kernels/cpp/{path.name}" for path in sources),
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build leaves files behind, which a later wheel would take in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "t5fx_command.py"):
        shutil.copy(ROOT / name, source)
    for folder in {folder.partition("/")[0] for folder in FOLDERS.values()}:
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    wheels = tmp_path_factory.mktemp("wheels")
    _run(
        *["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w"],
        wheels,
        source,
        cwd=source,
    )
    (path,) = wheels.glob("*.whl")
    return path


def test_wheel_holds_every_file_under_its_mapped_name(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == set(_expected_files()) | _expected_data()
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert {
        "t5fx/kernels/cpp/forward.cpp",
        "t5fx/kernels/reference.py",
        "t5fx/kernels/inner/swiglu.py",
        "t5fx/patterns/base.py",
        "t5fx/bench/demos/demo.py",
        "t5fx/bench/demos/weights/vit_digits.safetensors",
        "t5fx/bench/demos/weights/vit_fashion.safetensors",
        "t5fx/bench/diffusion/weights/dit_digits.safetensors",
    } <= names


@pytest.mark.extras
def test_everything_imports_from_the_wheel_alone(wheel, tmp_path):
    target = tmp_path / "installed"
    _run("-m", "pip", "install", "--no-deps", "-q", "--target", target, wheel, cwd=tmp_path)
    out = _run("-c", IMPORT_ALL, cwd=tmp_path, PYTHONPATH=str(target))
    found = {Path(path).relative_to(target).as_posix() for path in json.loads(out).values()}
    assert found == {name for name in _expected_files() if not name.endswith("__main__.py")}


@pytest.mark.extras
def test_everything_imports_from_the_editable_installation(tmp_path):
    found = {Path(path) for path in json.loads(_run("-c", IMPORT_ALL, cwd=tmp_path)).values()}
    assert found == {path for path in _expected_files().values() if path.name != "__main__.py"}


def test_the_suite_runs_on_the_editable_installation():
    installed = importlib.metadata.distributions(name="t5fx")
    urls = [url for dist in installed if (url := dist.read_text("direct_url.json"))]
    assert [json.loads(url)["dir_info"] for url in urls] == [{"editable": True}]


# Hugging Face's libraries ask for a package named `kernels`, which our folder must not pass for.
# Without an __init__.py the folder can be seen as a namespace at most, which has no file.
def test_kernels_in_the_repository_root_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import importlib.util, json\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(json.dumps(spec and spec.origin))"
    )
    origin = json.loads(_run("-c", code, cwd=ROOT))
    assert origin is None or ROOT not in Path(origin).parents
    assert "t5fx" not in importlib.metadata.packages_distributions().get("kernels", [])


@pytest.mark.extras
@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_model_libraries_do_not_take_our_folder_for_kernels(library):
    code = f"from {library}.utils.import_utils import is_kernels_available as f; print(bool(f()))"
    if "kernels" not in importlib.metadata.packages_distributions():
        assert _run("-c", code, cwd=ROOT).strip() == "False"


def test_a_wheel_of_a_tree_without_git_has_the_version_of_the_changelog(wheel):
    specification = importlib.util.spec_from_file_location(
        "release_check", ROOT / ".ci" / "release_check.py"
    )
    release_check = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(release_check)
    assert wheel.name.split("-")[1] == release_check.agreed_version(ROOT)
    assert t5fx.__version__ == importlib.metadata.version("t5fx") != "0.0.0"


def test_the_digest_of_the_code_covers_every_package():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    packages = tool["setuptools"]["packages"]
    counted = {name for name in packages if not name.startswith(("t5fx.bench", "t5fx.cli"))}
    specs = map(importlib.util.find_spec, counted)
    homes = {Path(spec.origin).parent.resolve() for spec in specs}
    assert set(digest.folders()) == homes


def test_a_folder_of_source_says_that_it_is_one():
    """As Python finds it first that is started in a checkout where t5fx is installed elsewhere."""
    call = [sys.executable, "-S", "-c", "import t5fx"]
    said = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode != 0
    assert "ImportError: expected t5fx as it is installed" in said.stderr
