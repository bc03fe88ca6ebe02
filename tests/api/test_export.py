"""Linearized models as programs for other processes and other runtimes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from vits import Shape

import t5fx

SHAPE = Shape()
#: With fewer cells than the 64 beyond which onnx's own evaluator cannot gather.
CONFIG = t5fx.LinearizeConfig(min_tokens=0, coarse=4)


@pytest.fixture(scope="module")
def lin():
    made = t5fx.linearize(SHAPE.model(), (SHAPE.images(),), config=CONFIG)
    return made.requires_grad_(False)


def fresh(code, *paths):
    """Run code in a process that has imported nothing of t5fx."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code, *map(str, paths)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


def test_a_saved_export_needs_no_more_than_the_import_of_t5fx(lin, tmp_path):
    images = SHAPE.images()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(lin, (images,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    torch.export.save(program, tmp_path / "model.pt2")
    other = torch.randn(5, 3, 24, 20)
    torch.save(other, tmp_path / "images.pt")
    code = (
        "import sys, torch, t5fx\n"
        "program = torch.export.load(sys.argv[1])\n"
        "torch.save(program.module()(torch.load(sys.argv[2])), sys.argv[3])\n"
    )
    fresh(code, *(tmp_path / name for name in ("model.pt2", "images.pt", "out.pt")))
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), lin(other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_module_too(lin, tmp_path):
    """torch.jit.trace calls the model twice and compares what it did."""
    images = SHAPE.images()
    torch.jit.trace(lin, (images,)).save(tmp_path / "model.pt")
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch, t5fx\n"
        "torch.save(torch.jit.load(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3])\n"
    )
    fresh(code, *(tmp_path / name for name in ("model.pt", "images.pt", "out.pt")))
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), lin(images))


@pytest.mark.filterwarnings("ignore")  # those of the exporter
def test_onnx_has_the_node_written_out(lin):
    reference = pytest.importorskip("onnx.reference", reason="of the whole test extra")
    images = SHAPE.images()
    program = torch.onnx.export(lin, (images,), dynamo=True, verbose=False)
    (name,) = (value.name for value in program.model.graph.inputs)
    session = reference.ReferenceEvaluator(program.model_proto)
    (out,) = session.run(None, {name: images.numpy()})
    np.testing.assert_allclose(out, lin(images).numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_aotinductor_compiles_an_export(lin, tmp_path):
    images = SHAPE.images()
    program = torch.export.export(lin, (images,))
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    model = torch._inductor.aoti_load_package(path)
    torch.testing.assert_close(model(images), lin(images), rtol=1e-4, atol=1e-5)
