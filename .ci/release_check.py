"""Builds what a release would publish from the commit that is checked out, and checks all of it.

`make release-check` runs it, with git, and with build, cffconvert, twine and uv installed. It
publishes nothing; the sdist and the wheel that passed are copied into the folder that is named, if
one is. It exits with 1 at the first thing that is wrong, and says what that is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from email.parser import BytesHeaderParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENTRY = re.compile(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", re.MULTILINE)


class Wrong(Exception):
    """What keeps the release from being published."""


def main(out: Path | None) -> None:
    version = agreed_version(ROOT)
    if (tags := git("tag", "--points-at", "HEAD", cwd=ROOT).split()) not in ([], [f"v{version}"]):
        raise Wrong(f"expected this commit to have the tag v{version} or none, got {tags}")
    print(f"version {version}", flush=True)
    with tempfile.TemporaryDirectory(prefix="t5fx-release-") as name:
        folder = Path(name)
        sdist, wheel = built(version, folder)
        python("twine", "check", "--strict", sdist, wheel)
        installed(wheel, version, folder / "environment")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            for path in (sdist, wheel):
                shutil.copy(path, out)
    print(f"version {version} can be published")


def agreed_version(root: Path) -> str:
    """The newest version of the changelog, which all that name a version have to equal."""
    entry = ENTRY.search((root / "CHANGELOG.md").read_text(encoding="utf-8"))
    if entry is None:
        raise Wrong("expected a line '## [X.Y.Z] - YYYY-MM-DD' in CHANGELOG.md, found none")
    tool = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    cited = re.search(r"^version: (.*)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    named = {
        "fallback_version in pyproject.toml": tool["setuptools_scm"]["fallback_version"],
        "version in CITATION.cff": cited[1] if cited else "none",
    }
    for where, version in named.items():
        if version != entry[1]:
            raise Wrong(
                f"expected {where} to be that of the newest entry of CHANGELOG.md, {entry[1]}, "
                f"got {version}"
            )
    return entry[1]


def built(version: str, folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it and equals the one built from the tree."""
    if changed := git("status", "--porcelain", cwd=ROOT):
        raise Wrong(f"expected everything to be committed, got changes:\n{changed}")
    cffconvert = Path(sys.executable).with_name("cffconvert")  # it has no `python -m`
    run(cffconvert, "--validate", "-i", ROOT / "CITATION.cff", cwd=ROOT)
    tree = folder / "tree"
    git("clone", "--quiet", str(ROOT), str(tree), cwd=folder)
    settings = {"SETUPTOOLS_SCM_PRETEND_VERSION_FOR_T5FX": version}
    python("build", "--wheel", "--outdir", folder / "direct", tree, **settings)
    git("clean", "-xdfq", cwd=tree)
    python("build", "--outdir", folder / "dist", tree, **settings)
    (direct,) = (folder / "direct").iterdir()
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    from_tree, from_sdist = contents(direct), contents(wheel)
    if different := [
        name
        for name in sorted({*from_tree, *from_sdist})
        if from_tree.get(name) != from_sdist.get(name)
    ]:
        raise Wrong(f"the wheels of the tree and of the sdist differ in {', '.join(different)}")
    return sdist, wheel


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def installed(wheel: Path, version: str, environment: Path) -> None:
    """The wheel alone installed and its command run; its extras resolved, each by itself."""
    python("uv", "venv", "--quiet", environment)
    into = ["uv", "pip", "install", "--quiet", "--python", environment]
    python(*into, wheel)
    command = environment / "bin" / "t5fx"
    if (said := run(command, "--version", cwd=environment)).strip() != version:
        raise Wrong(f"expected `t5fx --version` to print {version}, got {said}")
    run(command, "--help", cwd=environment)
    run(command, "env", "--json", cwd=environment)
    (metadata,) = [data for name, data in contents(wheel).items() if name.endswith("/METADATA")]
    for extra in BytesHeaderParser().parsebytes(metadata).get_all("Provides-Extra"):
        print(f"resolving the extra {extra}", flush=True)
        python(*into, "--dry-run", f"t5fx[{extra}] @ {wheel.as_uri()}")


def python(module: str, *arguments: str | Path, **environment: str) -> None:
    print(" ".join(map(str, ("$", module, *arguments))), flush=True)
    run(sys.executable, "-m", module, *arguments, cwd=ROOT, **environment)


def git(*arguments: str, cwd: Path) -> str:
    return run("git", *arguments, cwd=cwd)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What the command prints; an error that shows all of it if it fails."""
    ran = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise Wrong(f"{' '.join(map(str, command))} failed:\n{ran.stdout}{ran.stderr}")
    return ran.stdout


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    except Wrong as wrong:
        sys.exit(f"release-check: {wrong}")
