"""The search for settings of the Triton kernels, on times that are made up."""

import pytest
import torch

from t5fx.bench.gpu import tune
from t5fx.errors import T5Error
from t5fx.kernels.triton_kernels.configs import Config

START = Config(block_n=64, block_m=32, warps=4, stages=1, programs=2)


def test_neighbours_differ_in_one_setting():
    for other in tune.neighbours(START):
        assert sum(a != b for a, b in zip(START, other, strict=True)) == 1
    assert START._replace(warps=2) not in tune.neighbours(START)
    assert START._replace(unroll=False) in tune.neighbours(START)
    assert START._replace(parts=2) in tune.neighbours(START)
    assert START._replace(ahead=2) in tune.neighbours(START)
    assert all(other.block_m == 0 for other in tune.neighbours(START._replace(block_m=0)))


def test_descent_goes_over_several_settings():
    """To 128 tokens and 8 warps, past settings that do not work."""

    def seconds(config):
        if config.block_n > 128 or config.block_m > 32:
            return None
        return 10 - 2 * (config.block_n == 128) - 3 * (config.warps == 8) * (config.block_n == 128)

    best, share = tune.descend(START, seconds)
    assert best == START._replace(block_n=128, warps=8)
    assert share == pytest.approx(0.5)


def test_noise_is_no_gain():
    best, share = tune.descend(START, lambda config: 1.0 if config == START else 0.99)
    assert (best, share) == (START, 1)


def test_settings_in_use_must_work():
    with pytest.raises(T5Error, match="expected the settings in use to work"):
        tune.descend(START, lambda config: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU answers")
def test_needs_a_gpu():
    with pytest.raises(T5Error, match="expected a CUDA GPU"):
        tune.main()
