"""Which schedulers the pipeline takes, and that it draws what they are made for."""

from __future__ import annotations

import diffusers
import pytest
import torch

from tests.conftest import max_error
from tests.diffusers_bagel.conftest import SMALL, seeded


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
TAKEN = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
    "UniPCMultistepScheduler": FLOW,
    "DPMSolverMultistepScheduler": FLOW,
}
REFUSED = {
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "LCMScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True},
}


@pytest.fixture
def with_scheduler(own_pipe):
    def put(name: str, settings: dict):
        own_pipe.scheduler = getattr(diffusers, name)(**settings)
        return own_pipe

    return put


@pytest.mark.parametrize("name", REFUSED)
def test_a_scheduler_of_other_models_is_refused_by_name_before_anything_is_computed(name, with_scheduler, forwards):
    pipe = with_scheduler(name, REFUSED[name])
    seen = forwards(pipe)
    generator = seeded(0)
    with pytest.raises(ValueError, match=rf"`scheduler` is a {name}\b"):
        pipe("x", generator=generator, **SMALL)
    assert not seen.reading and not seen.denoising
    assert torch.equal(generator.get_state(), seeded(0).get_state())


@pytest.mark.parametrize("name", TAKEN)
def test_in_many_steps_every_flow_scheduler_draws_the_same(name, pipe, with_scheduler):
    settings = SMALL | {"num_inference_steps": 100}
    expected = pipe("a red circle", generator=seeded(0), **settings).images
    drawn = with_scheduler(name, TAKEN[name])("a red circle", generator=seeded(0), **settings).images
    assert max_error(drawn, expected) <= 0.05 * expected.abs().max().item()


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_sigmas_are_refused_where_the_scheduler_makes_its_own(name, with_scheduler, forwards):
    pipe = with_scheduler(name, TAKEN[name])
    seen = forwards(pipe)
    with pytest.raises(ValueError, match=rf"`sigmas` were passed, but {name}"):
        pipe("x", sigmas=[1.0, 0.5], **SMALL)
    assert not seen.reading


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_sigmas_are_shifted_once_by_every_scheduler_that_takes_them(name, with_scheduler):
    levels = []

    def read(pipeline, step, timestep, tensors):
        levels[:] = pipeline.scheduler.sigmas.tolist()
        return tensors

    with_scheduler(name, TAKEN[name])("x", sigmas=[1.0, 0.5], callback_on_step_end=read, **SMALL)
    assert levels[:2] == pytest.approx([1.0, 0.75], abs=2e-3)


def test_the_progress_bar_counts_steps_not_evaluations(with_scheduler, capsys):
    pipe = with_scheduler("FlowMatchHeunDiscreteScheduler", {"shift": 3.0})
    pipe.set_progress_bar_config(disable=False)
    pipe("x", **SMALL)
    assert "3/3" in capsys.readouterr().err
