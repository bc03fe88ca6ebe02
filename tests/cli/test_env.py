"""`t5fx env` prints what a bug report needs, whatever is installed."""

import importlib.metadata
import json
import platform

import pytest
import torch

from t5fx import cache
from t5fx_command import main


@pytest.fixture
def found(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("T5FX_CACHE_DIR", str(tmp_path))

    def run():
        assert main(["env", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_versions_devices_compiler_and_caches(found, tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    data = found()
    assert data["packages"]["torch"] == importlib.metadata.version("torch")
    assert platform.python_version() in data["python"]
    assert data["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert len(data["gpus"]) == torch.cuda.device_count()
    assert data["compiler"]["path"] and data["compiler"]["version"]
    assert data["caches"]["t5fx"] == {"path": str(tmp_path), "bytes": 5}


def test_packages_that_are_not_there(found, monkeypatch, capsys):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", lambda n: "1" if n == "t5fx" else version(n))
    assert set(found()["packages"].values()) == {"1", None}
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["timm"] == "not installed"


def test_without_a_compiler(found):
    # Not by monkeypatch, which deletes a setting of Inductor's instead of putting it back.
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        compiler = found()["compiler"]
    assert compiler["path"] is None and compiler["version"]


def test_verdicts_on_the_kernels(found, tmp_path):
    cache.save("trust", "key", {"status": "failed", "reason": "off by 3"}, "verdicts")
    (tmp_path / "trust-broken.json").write_text("{")
    by_status = {verdict["status"]: verdict for verdict in found()["verdicts"]}
    assert by_status["failed"]["reason"] == "off by 3" and by_status["failed"]["key"] == "key"
    assert by_status["unreadable"]["file"].endswith("trust-broken.json")


def test_secrets_stay_where_they_are(found, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_TOKEN", "hf_secret")
    monkeypatch.setenv("T5FX_TRITON", "0")
    data = found()
    assert data["variables"]["T5FX_TRITON"] == "0"
    assert "hf_secret" not in json.dumps(data)
