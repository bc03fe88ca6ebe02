"""The page on checkpoints does what it says."""

from pathlib import Path

import pages
from diffusers import DiTPipeline
from test_libraries_own import pipeline
from torch._dynamo.backends.debugging import aot_eager

import t5fx
from t5fx.backend import compile as backend

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)
    given = {"__name__": "page", "pipe": pipeline(), "DiTPipeline": DiTPipeline}
    left = pages.run(PAGE, names=given)
    assert t5fx.report(left["pipe"].transformer).rewritten
    names = {path.name for path in (tmp_path / "vit-t5-adapter").iterdir()}
    assert names >= {"README.md", "t5fx_config.json", "adapter.safetensors.index.json"}
