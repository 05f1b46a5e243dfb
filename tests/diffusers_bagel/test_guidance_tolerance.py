"""Branches of guidance that are held instead of computed, by a tolerance."""

from __future__ import annotations

import weakref

import pytest
import torch

from diffusers_bagel import BagelSession, Preset, send_all
from diffusers_bagel.denoising import MAX_SELECTED, Denoiser, velocities
from diffusers_bagel.guidance import EDITING, TEXT_TO_IMAGE
from diffusers_bagel.work import Decoding
from tests.conftest import golden_image, max_error
from tests.diffusers_bagel.conftest import MIXED, SMALL, assert_equals_single_runs, encoded, seeded
from tests.host_reads import HostReads


STEPS = {"num_inference_steps": 8, "output_type": "latent", "vae_sample_mode": "argmax"}
DRAW = STEPS | {"height": 48, "width": 64, "cfg_interval": (0.0, 1.0)}
EDIT = STEPS | {"image": golden_image("wide")}
TASKS = {"draw": DRAW, "edit": EDIT, "edit_without_its_image_scale": EDIT | {"image_guidance_scale": 1.0}}
LOOSE = 0.05


def branches(pipe, forwards, **settings) -> tuple[list[int], torch.Tensor]:
    """How many branches each step computes, and the latents."""
    seen = forwards(pipe)
    latents = pipe("a red circle", generator=seeded(0), **settings).images
    return seen.branches, latents


@pytest.mark.parametrize("task", TASKS)
def test_fewer_forwards_change_the_latents_a_little(task, pipe, forwards):
    every, plain = branches(pipe, forwards, **TASKS[task])
    held, latents = branches(pipe, forwards, guidance_tolerance=LOOSE, **TASKS[task])
    assert len(held) == len(every) and sum(held) < sum(every) - 2 and min(held) == 1
    # How fast a difference changes is known from the second step on.
    assert held[:2] == every[:2]
    assert 0 < (latents - plain).norm() / plain.norm() < LOOSE


@pytest.mark.parametrize("task", TASKS)
def test_without_leeway_everything_is_computed(task, pipe, forwards):
    every, plain = branches(pipe, forwards, **TASKS[task])
    computed, latents = branches(pipe, forwards, guidance_tolerance=0.0, **TASKS[task])
    assert computed == every and torch.equal(latents, plain)


def test_more_leeway_is_fewer_forwards(pipe, forwards):
    counts = [sum(branches(pipe, forwards, guidance_tolerance=value, **EDIT)[0]) for value in (0.001, 0.02, 1.0)]
    # At most: each branch at two steps, and the full one at all eight.
    assert counts[0] > counts[1] > counts[2] == 8 + 2 * 2


@torch.no_grad()
@pytest.mark.parametrize(("weighty", "scales"), [("no_text", (4.0, 1.001)), ("no_image", (1.001, 4.0))])
def test_branches_are_held_each_for_itself(weighty, scales, pipe):
    """What hardly counts need not be computed again."""
    guidance = EDITING.with_changes(text_scale=scales[0], image_scale=scales[1], tolerance=0.003)
    contexts, _ = pipe.prepare_contexts([encoded(pipe, MIXED[0])], [guidance])
    denoiser = Denoiser(pipe.transformer, contexts, [(3, 4)], [guidance])
    computed = []
    for level in torch.linspace(1.0, 0.1, 8):
        step = denoiser.step(torch.randn(1, 12, 16, generator=seeded(0)) * level, level, level, scales[0])
        own = denoiser.drawings[0].branches
        computed.append({name for name, branch in own.items() if branch in step.computed})
        velocities([step])
    other = {"no_text": "no_image", "no_image": "no_text"}[weighty]
    assert [other in names for names in computed] == [True, True] + [False] * 6
    assert all("full" in names for names in computed)
    assert sum(weighty in names for names in computed) > 3


@pytest.mark.parametrize("think", [False, True])
def test_each_image_of_a_batch_is_what_it_is_alone(think, pipe):
    settings = {"think": think, "max_think_tokens": 4, "guidance_tolerance": 0.01}
    assert_equals_single_runs(pipe, MIXED, **(SMALL | {"num_inference_steps": 8} | settings))


@pytest.fixture
def latents(monkeypatch) -> list[torch.Tensor]:
    """Of the pictures that sessions draw, as they are decoded."""
    drawn: list[torch.Tensor] = []
    together = Decoding.together

    def watched(works):
        drawn.extend(work.latents for work in works)
        return together(works)

    monkeypatch.setattr(Decoding, "together", staticmethod(watched))
    return drawn


def noise(seed: int) -> torch.Tensor:
    return torch.randn(12, 16, generator=seeded(seed))


def assert_close(together: list[torch.Tensor], alone: list[torch.Tensor]) -> None:
    for own, expected in zip(together, alone, strict=True):
        assert max_error(own, expected) <= 1e-5 * expected.abs().max()


SESSION = {"output": "image", "height": 48, "width": 64, "num_inference_steps": 8, "guidance_tolerance": 0.01}


def test_pictures_of_sessions_that_share_forwards_are_what_they_are_alone(pipe, latents):
    """One begins later than the others: it writes a plan first."""
    contents = ["a red circle", [golden_image("wide"), "make it green"], "two small yellow squares"]
    settings = SESSION | {"vae_sample_mode": "argmax"}
    for index, content in enumerate(contents):
        BagelSession(pipe).send(content, latents=noise(index), **settings)
    alone = latents.copy()
    latents.clear()
    turns = [(BagelSession(pipe), content) for content in contents]
    send_all(turns, latents=[noise(index) for index in range(3)], **settings)
    assert_close(latents, alone)


def test_a_step_that_failed_is_taken_again_as_if_it_had_not(pipe, latents):
    """A forward of several fails for want of memory, and each is taken by itself."""
    turns = ["a red circle", "two small yellow squares"]
    for index, content in enumerate(turns):
        BagelSession(pipe).send(content, latents=noise(index), **SESSION)
    alone = latents.copy()
    latents.clear()

    def fail(module, args, kwargs):
        if kwargs.get("latents") is not None and len(kwargs["latent_grid_hw"]) > 2:
            raise torch.OutOfMemoryError("no memory is left")

    hook = pipe.transformer.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        send_all([(BagelSession(pipe), content) for content in turns], latents=[noise(0), noise(1)], **SESSION)
    finally:
        hook.remove()
    assert_close(latents, alone)


def test_nothing_is_held_from_call_to_call(pipe):
    first, second = (
        pipe("a red circle", generator=seeded(0), guidance_tolerance=LOOSE, **DRAW).images for _ in range(2)
    )
    assert torch.equal(first, second)


@torch.no_grad()
def test_a_step_at_the_noise_level_of_the_one_before_keeps_what_is_known(pipe):
    """As schedulers of higher order take them."""
    guidance = TEXT_TO_IMAGE.with_changes(tolerance=0.0)
    contexts, _ = pipe.prepare_contexts([encoded(pipe, MIXED[1])], [guidance])
    denoiser = Denoiser(pipe.transformer, contexts, [(3, 4)], [guidance])
    for level in (0.9, 0.9, 0.8, 0.8):
        sigma = torch.tensor(level)
        assert denoiser.velocity(torch.randn(1, 12, 16, generator=seeded(0)), sigma, sigma, 4.0).isfinite().all()


def test_what_steps_share_is_kept_for_few_of_the_ways_in_which_branches_come_together(pipe):
    """It is as large as the latents of all branches, and a batch could have another one at each step."""
    made, kept = [], []

    def note(module, args, kwargs):
        if kwargs.get("latents") is not None and kwargs.get("input_ids") is None:
            made.append(weakref.ref(kwargs["past_key_values"]))

    def count(pipeline, step, timestep, tensors):
        kept.append(len({id(cache) for reference in made if (cache := reference()) is not None}))
        return tensors

    hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        settings = STEPS | {"num_inference_steps": 24, "guidance_tolerance": 0.003, "cfg_interval": (0.0, 1.0)}
        pipe(messages=MIXED, generator=seeded(*range(6)), callback_on_step_end=count, **settings)
    finally:
        hook.remove()
    # An object has one reference of this kind.
    assert len({id(reference) for reference in made}) > MAX_SELECTED == max(kept)


@torch.no_grad()
def test_the_host_reads_one_number_for_each_branch_that_was_computed(pipe):
    guidance = TEXT_TO_IMAGE.with_changes(tolerance=1.0, interval=(0.0, 1.0))
    contexts, _ = pipe.prepare_contexts([encoded(pipe, MIXED[1])], [guidance])
    with HostReads() as reads:
        reads.put(pipe.transformer)
        denoiser = Denoiser(pipe.transformer, contexts, [(3, 4)], [guidance])
        latents = reads.put(torch.randn(1, 12, 16, generator=seeded(0)))
        for level in (0.9, 0.8, 0.7, 0.6, 0.5):
            denoiser.velocity(latents, torch.tensor(level), reads.put(torch.tensor(level)), 4.0)
    assert len(reads.found) == 1, reads.found


def test_a_preset_may_set_it(pipe, latents):
    preset = Preset("image", "", "", {"guidance_tolerance": LOOSE})
    expected, found = (
        pipe("a", generator=seeded(0), **own, **DRAW).images
        for own in ({"guidance_tolerance": LOOSE}, {"preset": preset})
    )
    assert torch.equal(found, expected)
    settings = SESSION | {"guidance_tolerance": None, "latents": noise(0)}
    for own in ({"preset": preset}, {"guidance_tolerance": LOOSE}, {}):
        BagelSession(pipe).send("a", **(settings | own))
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])


class TestBadInput:
    @pytest.mark.parametrize("value", [-0.1, 1.5, "1", True, [0.1], float("nan")])
    def test_what_is_no_share(self, value, pipe):
        for call in (pipe, BagelSession(pipe).send):
            with pytest.raises((TypeError, ValueError), match="`guidance_tolerance` must be a number"):
                call("a", guidance_tolerance=value)

    def test_beside_taylorseer(self, own_pipe):
        own_pipe.enable_taylorseer()
        for call in (own_pipe, BagelSession(own_pipe).send):
            with pytest.raises(ValueError, match="`guidance_tolerance` was passed.*step cache"):
                call("a", guidance_tolerance=0.01)
