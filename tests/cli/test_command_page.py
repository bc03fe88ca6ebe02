"""The commands of docs/command.md print what the page says, numbers and widths aside."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t5fx_command import commands, main

PAGE = (Path(__file__).parent.parent.parent / "docs" / "command.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n\$ t5fx (.+)\n((?:.|\n)*?)```", PAGE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("page")
    ((name, source),) = re.findall(r'```python title="(\S+)"\n((?:.|\n)*?)```', PAGE)
    (made / name).write_text(source)
    (made / "photographs").mkdir()
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made / "photographs" / f"{index}.png")
    return made


def plain(text):
    """The words of an output: no numbers, no frames of tables, no spaces that depend on them."""
    text = re.sub(r"-?\d[\d.,e-]*", "#", text)
    return re.sub(r"[\s─-╿]+", " ", text).strip()


@pytest.mark.parametrize(("line", "output"), BLOCKS, ids=[line for line, _ in BLOCKS])
def test_a_command_prints_what_the_page_says(line, output, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the page is a CPU's
    assert main(shlex.split(line)) == 0
    assert plain(output) == plain(capsys.readouterr().out)


def test_the_page_has_every_command():
    headings = set(re.findall(r"[\w-]+", " ".join(re.findall(r"^## (.+)$", PAGE, re.MULTILINE))))
    assert set(commands()) <= headings
