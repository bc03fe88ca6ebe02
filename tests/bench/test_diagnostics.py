"""The code of the manual's page on diagnostics runs, and the command that makes its pictures."""

import shutil
from pathlib import Path

import pytest
import torch
from test_demo import tiny_vit

import t5fx
from t5fx.bench.demos import demo, diagnostics, dinov2

PAGE = Path(__file__).parents[2] / "docs" / "diagnostics.md"


@pytest.mark.slow  # it converts and saves a model first
def test_the_command_from_end_to_end(tmp_path, monkeypatch, capsys):
    model = tiny_vit(depth=2)
    monkeypatch.setattr(dinov2, "load_dinov2_small", lambda: model)
    monkeypatch.setattr(demo, "SIZE", 56)
    config = t5fx.LinearizeConfig(min_tokens=0)
    t5fx.save_pretrained(
        t5fx.linearize(model, (torch.rand(1, 3, 56, 56),), config=config), tmp_path / "saved"
    )
    page = Path(shutil.copy(PAGE, tmp_path / "page.md"))
    given = ["--model", str(tmp_path / "saved"), "--out", str(tmp_path), "--page", str(page)]
    diagnostics.main([*given, "--sites", "blocks.1.attn"])
    text = page.read_text()
    assert text.count("| blocks.") == 2 and "at 56 px" in text
    assert "run with its TTT nodes" in capsys.readouterr().out
    for name in ("key-shift", "maps"):
        assert (tmp_path / f"diagnostics-{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["key-shift", "maps"])
def test_the_page_shows_its_pictures(name):
    assert f"](diagnostics-{name}.png)" in PAGE.read_text(encoding="utf-8")
    assert (PAGE.parent / f"diagnostics-{name}.png").read_bytes().startswith(b"\x89PNG")
