"""Inputs that a sampler's own steps are: what is recorded, and training on nothing else."""

import random

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from dits import dit, pipeline
from torch import nn

import t5fx
from t5fx.errors import TrainingError

#: Without near attention, which leaves next to nothing to learn on a few tokens.
CONFIG = t5fx.LinearizeConfig(min_tokens=0, neighborhood=0, coarse=0, impl="reference")
NOISE, CLASSES = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
EXAMPLE = {"hidden_states": NOISE, "timestep": torch.tensor([3, 3]), "class_labels": CLASSES}


class Wide(nn.Module):
    """A forward that takes what it takes by position only."""

    def forward(self, x, /):
        return x


def sampler(model, scheduler, steps=3):
    """Plain sampling of a model by a scheduler; and the model's calls, as they are made."""
    calls = []

    @torch.no_grad()
    def sample():
        scheduler.set_timesteps(steps)
        x = torch.randn(2, 4, 8, 8)
        for t in scheduler.timesteps:
            calls.append((x.clone(), t))
            out = model(x, timestep=t.expand(2), class_labels=CLASSES).sample[:, :4]
            x = scheduler.step(out, t, x).prev_sample

    return sample, calls


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        DDIMScheduler(prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=["DDPM", "v-prediction", "rectified flow"],
)
def test_a_pass_gives_every_step_of_the_softmax_models_trajectory(scheduler):
    torch.manual_seed(0)
    model = dit(1)
    lin = t5fx.linearize(model, (), EXAMPLE, config=CONFIG).train()
    sample, calls = sampler(lin, scheduler)
    batches = t5fx.trajectory_inputs(lin, sample, runs=2)
    torch.manual_seed(1)
    random.seed(0)
    found = list(batches)
    assert lin.training and len(found) == len(calls) == 6
    of_softmax, wanted = sampler(model, scheduler)
    torch.manual_seed(1)
    for _ in range(2):
        of_softmax()
    order = [
        next(i for i, (x, _) in enumerate(calls) if x.equal(b["hidden_states"])) for b in found
    ]
    assert sorted(order) == list(range(6)) and order != sorted(order)
    for index, batch in zip(order, found, strict=True):
        x, t = wanted[index]
        torch.testing.assert_close(batch["hidden_states"], x, rtol=1e-3, atol=1e-3)
        assert set(batch) == set(EXAMPLE)
        assert batch["timestep"].tolist() == [t.item()] * 2 and batch["class_labels"].equal(CLASSES)
    assert not any(b["hidden_states"].equal(x) for b in batches for x, _ in calls[:6])


def test_align_and_distill_learn_from_a_pipeline_and_no_data():
    torch.manual_seed(0)
    pipe = pipeline(dit(1))
    for parameter in pipe.transformer.parameters():  # of which the adaptive norms start at zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    pipe.transformer = t5fx.linearize(pipe.transformer, (), EXAMPLE, config=CONFIG)
    batches = t5fx.trajectory_inputs(
        pipe.transformer, lambda: pipe([1, 2], num_inference_steps=4, output_type="np")
    )
    held_out = list(batches)
    assert {len(batch["hidden_states"]) for batch in held_out} == {4}  # guidance
    align = t5fx.Align(batches, steps=30, held_out=held_out)
    align(pipe.transformer)
    before, after = zip(*align.result.held_out.values(), strict=True)
    assert sum(after) < 0.8 * sum(before)
    distill = t5fx.Distill(batches, steps=2, lr=1e-3, output="relative", log_every=1)
    distill(pipe.transformer)
    assert (
        distill.result.steps == 2 and pipe([1], num_inference_steps=2, output_type="np").images.size
    )


@pytest.mark.parametrize("linearized", [False, True])
def test_a_compiled_model_is_not_compiled_again_for_it(linearized):
    model = t5fx.linearize(dit(1), (), EXAMPLE, config=CONFIG) if linearized else dit(1)

    def never(gm, inputs):
        raise AssertionError("compiled")

    compiled = torch.compile(model, backend=never)
    sample, _ = sampler(compiled, DDIMScheduler())
    assert len(list(t5fx.trajectory_inputs(compiled, sample))) == 3


def test_inputs_recorded_in_inference_mode_can_be_trained_on():
    model = nn.Linear(3, 3)
    x = torch.randn(2, 3)

    @torch.inference_mode()
    def sample():
        model(x.clone().mul_(2))

    (batch,) = t5fx.trajectory_inputs(model, sample)
    assert batch["input"].equal(2 * x)
    model(batch["input"]).sum().backward()
    assert model.weight.grad is not None


def test_what_cannot_be_recorded_is_said():
    model = nn.Linear(3, 3)
    with pytest.raises(TrainingError, match=r"that calls the Linear .* got one that ended without"):
        list(t5fx.trajectory_inputs(model, lambda: model.forward(torch.ones(3))))
    wide = Wide()
    with pytest.raises(TrainingError, match="given by name, got Wide's, which takes 1 by position"):
        list(t5fx.trajectory_inputs(wide, lambda: wide(torch.ones(3))))
    assert not wide._forward_pre_hooks
    with pytest.raises(TrainingError, match="runs: expected a whole number above 0, got 0"):
        t5fx.trajectory_inputs(model, lambda: None, runs=0)
