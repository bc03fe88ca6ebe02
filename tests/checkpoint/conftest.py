"""The model that several files save and load."""

import pytest
import torch
from vits import Shape

import t5fx


@pytest.fixture(scope="module")
def lin():
    """A linearized `Shape(depth=1)`."""
    torch.manual_seed(0)
    shape = Shape(depth=1)
    config = t5fx.LinearizeConfig(min_tokens=0)
    return t5fx.linearize(shape.model(), (shape.images(),), config=config)
