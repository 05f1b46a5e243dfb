"""Step caches of diffusers: what they leave out is what the library's hooks would, and what they keep is of one drawing."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    CacheMixin,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from diffusers.hooks import apply_first_block_cache, apply_mag_cache, apply_sea_cache, apply_taylorseer_cache
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import nn

from bagel_server import Engine
from diffusers_bagel import BagelPipeline, BagelSession, InterleaveInferencer, denoising, step_caches
from diffusers_bagel.caching import TaylorSeerSchedule, TaylorSeerState
from diffusers_bagel.denoising import Denoiser, velocities
from diffusers_bagel.guidance import TEXT_TO_IMAGE
from diffusers_bagel.step_caches import LayerCaching
from diffusers_bagel.work import Drawing
from tests.conftest import conversation, golden_image
from tests.diffusers_bagel.conftest import EDIT, SMALL, encoded, paused, seeded
from transformers_bagel.image_processing_bagel import unpatchify
from transformers_bagel.layers import BagelDecoderLayer


STEPS = 8
DRAW = SMALL | {"num_inference_steps": STEPS}
RATIOS = [1.0, 1.0, 1.02, 0.99, 0.98, 0.97, 0.95, 0.9]
MAG = MagCacheConfig(threshold=0.04, retention_ratio=0.3, num_inference_steps=STEPS, mag_ratios=RATIOS)
# Each leaves out some steps of the tiny model, and computes others.
LAYERS = {"first block": FirstBlockCacheConfig(0.1), "mag": MAG, "sea": SeaCacheConfig(0.3)}
CACHES = LAYERS | {"taylorseer": TaylorSeerCacheConfig(cache_interval=2, taylor_factors_dtype=torch.float32)}
NOTHING = {
    "first block": FirstBlockCacheConfig(0),
    "mag": replace(MAG, threshold=0),
    "sea": SeaCacheConfig(0),
    "calibration": MagCacheConfig(calibrate=True, num_inference_steps=STEPS),
    "taylorseer": TaylorSeerCacheConfig(cache_interval=1),
}


def of_each(configs: dict[str, Any]):
    return pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in configs.items()])


@pytest.fixture
def cached(pipe) -> Iterator[Callable[[Any], BagelPipeline]]:
    """The pipeline with a step cache."""

    def enable(config: Any) -> BagelPipeline:
        if pipe.is_cache_enabled:
            pipe.disable_cache()
        pipe.enable_cache(config)
        return pipe

    yield enable
    pipe._step_cache = pipe._calibration = None


@contextmanager
def layer_calls(pipe: BagelPipeline, draws: bool = True) -> Iterator[list[int]]:
    """How often each layer is computed, of denoising steps or of texts."""
    layers = pipe.transformer.model.language_model.layers
    calls, hooks = [0] * len(layers), []
    for index, layer in enumerate(layers):

        def note(module, args, kwargs, index=index):
            calls[index] += (kwargs["routing"] is not None) == draws

        hooks.append(layer.self_attn.register_forward_pre_hook(note, with_kwargs=True))
    yield calls
    for hook in hooks:
        hook.remove()


def drawn(pipe: BagelPipeline, seed: int = 0, prompt: str = "a red circle", **settings: Any) -> torch.Tensor:
    return pipe(prompt, generator=seeded(seed), **(DRAW | settings)).images


class TestDecisions:
    """Equal to those of the library's hooks, which hang on the model itself here, and keep one branch."""

    @pytest.fixture
    def prompt(self, own_pipe) -> tuple[BagelPipeline, dict]:
        contexts, _ = own_pipe.prepare_contexts([encoded(own_pipe, conversation(["a red circle"]))], [TEXT_TO_IMAGE])
        return own_pipe, contexts[0]

    @staticmethod
    def walk(denoiser: Denoiser, velocity: Callable) -> torch.Tensor:
        """Latents behind all steps, without guidance."""
        latents = torch.randn(1, 12, 16, generator=seeded(0))
        levels = torch.linspace(1, 0, STEPS + 1)
        denoiser.num_steps = STEPS
        for index, (sigma, following) in enumerate(itertools.pairwise(levels)):
            latents = latents + (following - sigma) * velocity(index, latents, sigma)
        return latents

    @of_each(LAYERS | {"sea by order 0": SeaCacheConfig(0.3, residual_order=0, power_exp=2.0)})
    @torch.no_grad()
    def test_hooks_on_the_model(self, config, prompt):
        pipe, contexts = prompt
        caching = LayerCaching(config)
        ours = Denoiser(pipe.transformer, [contexts], [(3, 4)], [TEXT_TO_IMAGE], caching)
        with layer_calls(pipe) as calls:
            found = self.walk(ours, lambda index, latents, sigma: ours.velocity(latents, sigma, sigma, 1.0))
        assert 0 < calls[-1] < STEPS
        language_model, now = pipe.transformer.model.language_model, {}
        TransformerBlockRegistry.register(BagelDecoderLayer, TransformerBlockMetadata(return_hidden_states_index=0))
        if isinstance(config, SeaCacheConfig):
            config = replace(config, raw_vision_callback=lambda *_: [unpatchify(now["latents"], (3, 4), 2)[:, None]])
        apply = {FirstBlockCacheConfig: apply_first_block_cache, MagCacheConfig: apply_mag_cache}
        apply.get(type(config), apply_sea_cache)(language_model, config)
        plain = Denoiser(pipe.transformer, [contexts], [(3, 4)], [TEXT_TO_IMAGE])

        def velocity(index: int, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            now["latents"] = latents[0]
            place = {"step_index": index, "num_inference_steps": STEPS, "sigma": float(sigma)}
            with CacheMixin.cache_context(language_model, "full", **place):
                return plain.velocity(latents, sigma, sigma, 1.0)

        with layer_calls(pipe) as expected:
            latents = self.walk(plain, velocity)
        assert calls == expected
        assert torch.equal(found, latents)

    @pytest.mark.parametrize("end", [None, 9])
    @pytest.mark.parametrize("order", [0, 1, 3])
    @pytest.mark.parametrize(("interval", "before"), [(1, 1), (2, 1), (3, 3), (5, 3), (4, 20)])
    def test_taylorseer(self, interval, before, order, end):
        """Which steps are computed, and what the others are."""
        dtype = torch.float32 if order else torch.bfloat16
        config = TaylorSeerCacheConfig(interval, before, end, order, dtype, cache_identifiers=["block"])
        given = [torch.randn(4, 8, generator=seeded(step)) for step in range(14)]
        computed: list[int] = []

        class Block(nn.Module):
            def forward(self, step: int) -> torch.Tensor:
                computed.append(step)
                return given[step]

        class Model(nn.Module, CacheMixin):
            def __init__(self):
                super().__init__()
                self.block = Block()

        model = Model()
        apply_taylorseer_cache(model, config)
        state = TaylorSeerState(TaylorSeerSchedule.of(replace(config, cache_identifiers=None)))
        ours = []
        for step, features in enumerate(given):
            with model.cache_context("full"):
                expected = model.block(step)
            if state.advance():
                ours.append(step)
                state.update(features)
            else:
                torch.testing.assert_close(state.predict(), expected)
        assert ours == computed


class TestPictures:
    @of_each(NOTHING)
    def test_nothing_left_out_is_the_plain_picture(self, config, cached, pipe, monkeypatch):
        """To the bit beside forwards of a branch each, as are those of a cache."""
        shared = drawn(pipe)
        monkeypatch.setattr(denoising, "MAX_STEP_TOKENS_CPU", 1)
        expected = drawn(pipe)
        assert torch.equal(drawn(cached(config)), expected)
        torch.testing.assert_close(expected, shared, atol=1e-5, rtol=0)

    @of_each(CACHES)
    def test_some_layers_are_left_out_of_each_branch_and_none_of_a_text(self, config, cached, pipe):
        settings = {"think": True, "max_think_tokens": 4}
        with layer_calls(pipe, draws=False) as reading:
            expected = pipe("a red circle", generator=seeded(0), **DRAW, **settings)
        with layer_calls(cached(config), draws=False) as calls:
            out = pipe("a red circle", generator=seeded(0), **DRAW, **settings)
        assert calls == reading
        assert out.texts == expected.texts
        difference = (out.images - expected.images).norm() / expected.images.norm()
        assert 0 < difference < 0.2

    @of_each(CACHES)
    def test_a_batch_draws_what_each_prompt_draws_alone(self, config, cached):
        pipe = cached(config)
        batch = pipe(["a red circle", "many squares"], generator=seeded(1, 2), **DRAW).images
        for index, prompt in enumerate(["a red circle", "many squares"]):
            torch.testing.assert_close(batch[index], drawn(pipe, index + 1, prompt)[0], atol=1e-5, rtol=0)

    @of_each(CACHES)
    def test_edits_have_three_branches(self, config, cached, pipe):
        settings = EDIT | {"num_inference_steps": STEPS, "image": golden_image("wide"), "image_guidance_scale": 1.5}
        plain = drawn(pipe, **settings)
        with layer_calls(cached(config)) as calls:
            image = drawn(pipe, **settings)
        assert calls[-1] < 3 * STEPS
        assert 0 < (image - plain).norm() / plain.norm() < 0.3

    @of_each(CACHES)
    def test_the_next_call_is_as_the_first_whatever_ended_it(self, config, cached):
        pipe = cached(config)
        expected = drawn(pipe)

        def interrupt(call, step, timestep, tensors):
            call._interrupt = step == 3
            return tensors

        drawn(pipe, callback_on_step_end=interrupt)
        assert torch.equal(drawn(pipe), expected)

    def test_the_original_interface_draws_with_it(self, cached, pipe):
        inferencer = InterleaveInferencer(pipe)
        settings = {"cfg_img_scale": 1.0, "num_timesteps": STEPS + 1}

        def gen() -> bytes:
            torch.manual_seed(0)
            context = inferencer.update_context_text("a red circle", inferencer.init_gen_context())
            return inferencer.gen_image(
                (48, 64), context, cfg_text_precontext=inferencer.init_gen_context(), **settings
            ).tobytes()

        plain = gen()
        cached(LAYERS["first block"])
        assert gen() != plain
        with pytest.raises(ValueError, match="disable_cache"):
            inferencer.gen_image((48, 64), inferencer.init_gen_context(), 1.0, enable_taylorseer=True)


class TestWhoseStateItIs:
    @staticmethod
    def turns(pipe: BagelPipeline) -> list[tuple[BagelSession, str, dict]]:
        """Two sessions, what is said to each, and how."""
        sizes = {"height": 48, "width": 64, "num_inference_steps": STEPS, "output": "image"}
        prompts = ("a red circle", "many small squares")
        return [(BagelSession(pipe), prompt, sizes | {"generator": seeded(len(prompt))}) for prompt in prompts]

    def alone(self, pipe: BagelPipeline) -> list[bytes]:
        return [session.send(said, **how).images[0].tobytes() for session, said, how in self.turns(pipe)]

    @of_each(CACHES)
    def test_two_sessions_in_turns(self, config, cached):
        pipe = cached(config)
        expected = self.alone(pipe)
        streams = [session.stream(said, progress=True, **how) for session, said, how in self.turns(pipe)]
        found: list[list] = [[], []]
        for events in itertools.zip_longest(*streams):
            for images, event in zip(found, events, strict=True):
                if event is not None and event.type == "image":
                    images.append(event.image.tobytes())
        assert found == [[image] for image in expected]

    @of_each(CACHES)
    def test_an_engine_that_draws_both_at_once(self, config, cached):
        pipe = cached(config)
        expected = self.alone(pipe)
        with Engine(pipe) as engine:
            answers = [engine.submit(session, said, **how) for session, said, how in self.turns(pipe)]
            found = [answer.result(60).images[0].tobytes() for answer in answers]
        for image, alone in zip(found, expected, strict=True):
            # The prompts are read together, and the pictures decoded: sums are rounded otherwise.
            assert max(abs(one - other) for one, other in zip(image, alone, strict=True)) <= 1

    @of_each(CACHES)
    def test_two_threads(self, config, cached):
        pipe = cached(config)
        expected = [drawn(pipe, 0), drawn(pipe, 1, "many squares")]
        with paused(drawn, pipe, 0) as first:
            assert torch.equal(drawn(pipe, 1, "many squares"), expected[1])
        assert torch.equal(first.result(), expected[0])
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(drawn, [pipe] * 2, [0, 1], ["a red circle", "many squares"]))
        assert all(map(torch.equal, found, expected))

    def test_answers_of_different_caches_take_no_step_together(self, pipe):
        """The cache is changed while an engine draws."""
        with torch.no_grad():
            contexts, _ = pipe.prepare_contexts([encoded(pipe, conversation(["a red circle"]))], [TEXT_TO_IMAGE])
        denoisers = [
            Denoiser(pipe.transformer, contexts, [(3, 4)], [TEXT_TO_IMAGE], caching)
            for caching in (None, LayerCaching(LAYERS["first block"]))
        ]
        sigma, latents = torch.tensor(0.9), torch.randn(1, 12, 16)
        plain, other = (Drawing(denoiser.step(latents, sigma, sigma, 4.0)) for denoiser in denoisers)
        assert plain.goes_with(plain) and other.goes_with(other)
        assert not plain.goes_with(other)

    @of_each(LAYERS)
    @torch.no_grad()
    def test_a_step_that_failed_can_be_taken_again(self, config, pipe):
        contexts, _ = pipe.prepare_contexts([encoded(pipe, conversation(["a red circle"]))], [TEXT_TO_IMAGE])
        last = pipe.transformer.model.language_model.layers[-1]

        def walk(failing: int | None) -> tuple[torch.Tensor, int]:
            """Latents behind all steps, and how many of these failed in a branch, the first or the second, at their first try."""
            denoiser = Denoiser(pipe.transformer, contexts, [(3, 4)], [TEXT_TO_IMAGE], LayerCaching(config))
            denoiser.num_steps, latents, failures = STEPS, torch.randn(1, 12, 16, generator=seeded(0)), 0
            for sigma in torch.linspace(1, 0.5, STEPS):
                step, calls = denoiser.step(latents, sigma, sigma, 4.0), itertools.count()

                def fail(*_, calls=calls):
                    if next(calls) == failing:
                        raise torch.OutOfMemoryError("no memory is left")

                hook = last.register_forward_pre_hook(fail)
                try:
                    (velocity,) = velocities([step])
                except torch.OutOfMemoryError:
                    hook.remove()
                    failures += 1
                    (velocity,) = velocities([step])
                hook.remove()
                latents = latents - 0.1 * velocity
            return latents, failures

        expected, _ = walk(None)
        for branch in (0, 1):
            found, failures = walk(branch)
            assert failures > 1
            assert torch.equal(found, expected)

    @of_each(LAYERS)
    @torch.no_grad()
    def test_what_was_kept_goes_with_the_drawing(self, config, pipe):
        contexts, _ = pipe.prepare_contexts([encoded(pipe, conversation(["a red circle"]))], [TEXT_TO_IMAGE])
        denoiser = Denoiser(pipe.transformer, contexts, [(3, 4)], [TEXT_TO_IMAGE], LayerCaching(config))
        denoiser.num_steps, latents = STEPS, torch.randn(1, 12, 16, generator=seeded(0))
        for sigma in (torch.tensor(1.0), torch.tensor(0.9)):
            denoiser.velocity(latents, sigma, sigma, 4.0)
        state = denoiser.cache(0).state
        kept = [
            weakref.ref(value) for value in vars(state).values() if isinstance(value, torch.Tensor) and value.ndim > 1
        ] + [weakref.ref(residual) for _, _, residual in getattr(state, "history", [])]
        assert kept
        gc.disable()
        try:
            del denoiser, state
            assert not any(reference() is not None for reference in kept)
        finally:
            gc.enable()
        assert not any(hasattr(module, "_diffusers_hook") for module in pipe.transformer.modules())


class TestMagCache:
    def test_calibration_gives_what_to_pass(self, cached, capsys):
        pipe = cached(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
        with pytest.raises(ValueError, match="nothing is calibrated"):
            _ = pipe.mag_ratios
        drawn(pipe)
        first = pipe.mag_ratios
        drawn(pipe, 1)
        pipe.disable_cache()
        assert len(first) == len(pipe.mag_ratios) == STEPS
        assert first[0] == 1.0 and first != pipe.mag_ratios
        # The library would print a list for each branch, and none for those that guidance ends.
        assert capsys.readouterr().out == ""
        config = MagCacheConfig(mag_ratios=pipe.mag_ratios, num_inference_steps=STEPS)
        with layer_calls(cached(config)) as calls:
            drawn(pipe)
        assert 0 < calls[0] < 2 * STEPS - 1

    def test_ratios_of_other_numbers_of_steps_are_kept_apart(self, cached):
        config = MagCacheConfig(calibrate=True, num_inference_steps=STEPS)
        pipe = cached(config)
        drawn(pipe, num_inference_steps=4)
        alone = pipe.mag_ratios
        pipe = cached(config)
        drawn(pipe)
        of_more = pipe.mag_ratios
        drawn(pipe, num_inference_steps=4)
        assert len(alone) == 4 and pipe.mag_ratios == alone
        drawn(pipe)
        assert pipe.mag_ratios == pytest.approx(of_more)

    def test_ratios_of_other_steps_are_interpolated_and_that_is_said_once(self, cached, monkeypatch):
        said: list[str] = []
        monkeypatch.setattr(step_caches.logger, "warning", said.append)
        pipe = cached(MAG)
        found = drawn(pipe, num_inference_steps=6)
        drawn(pipe, num_inference_steps=6)
        assert said == [
            "MagCache's ratios are of 8 steps, and are interpolated for 6. They depend on how far steps are apart: calibrate with 6."
        ]
        assert torch.equal(drawn(cached(replace(MAG, num_inference_steps=6)), num_inference_steps=6), found)


def changed(config: Any, **values: Any) -> Any:
    """A configuration of which something was set after it was made, and checked by the library."""
    config = replace(config)
    vars(config).update(values)
    return config


REFUSALS = [
    (PyramidAttentionBroadcastConfig(), ValueError, "PyramidAttentionBroadcastConfig.*attention classes"),
    (FasterCacheConfig(), ValueError, "FasterCacheConfig.*contexts of their own"),
    (TextKVCacheConfig(), ValueError, "TextKVCacheConfig.*kept in any case"),
    (None, TypeError, "`config` must be"),
    ("first_block", TypeError, "`config` must be"),
    (FirstBlockCacheConfig, TypeError, "`config` must be"),
    (FirstBlockCacheConfig(-0.1), ValueError, "`threshold`"),
    (FirstBlockCacheConfig("0.1"), TypeError, "`threshold`"),
    (MagCacheConfig(mag_ratios=[float("nan")] * 28), ValueError, "`mag_ratios`"),
    (MagCacheConfig(mag_ratios=torch.ones(28, 2)), ValueError, "`mag_ratios`.*one for each step"),
    (MagCacheConfig(mag_ratios=[-1.0] * 28), ValueError, "`mag_ratios`.*at least 0"),
    (changed(MAG, mag_ratios=None), TypeError, "`mag_ratios` must be a list of numbers, got None"),
    (SeaCacheConfig(retention_steps=1.5), TypeError, "`retention_steps`"),
    (SeaCacheConfig(cache_end_steps=float("nan")), TypeError, "`cache_end_steps`"),
    (MagCacheConfig(calibrate=True, num_inference_steps=0), ValueError, "`num_inference_steps`"),
    (MagCacheConfig(calibrate=True, retention_ratio=2), ValueError, "`retention_ratio`"),
    (MagCacheConfig(calibrate=True, max_skip_steps=1.5), TypeError, "`max_skip_steps`"),
    (SeaCacheConfig(raw_vision_callback=print), ValueError, "`raw_vision_callback`"),
    (TaylorSeerCacheConfig(cache_interval=0), ValueError, "`cache_interval`"),
    (TaylorSeerCacheConfig(disable_cache_before_step=0), ValueError, "`disable_cache_before_step`"),
    (TaylorSeerCacheConfig(disable_cache_after_step="x"), TypeError, "`disable_cache_after_step`"),
    (TaylorSeerCacheConfig(max_order=-1), ValueError, "`max_order`"),
    (TaylorSeerCacheConfig(taylor_factors_dtype=torch.int8), TypeError, "`taylor_factors_dtype`"),
    (TaylorSeerCacheConfig(cache_identifiers=["x"]), ValueError, "`cache_identifiers`"),
    (TaylorSeerCacheConfig(skip_predict_identifiers=["x"]), ValueError, "`skip_predict_identifiers`"),
]


class TestRefusals:
    @pytest.mark.parametrize(("config", "kind", "message"), REFUSALS, ids=lambda value: str(value)[:60])
    def test_a_cache_that_cannot_work(self, config, kind, message, own_pipe):
        with pytest.raises(kind, match=message):
            own_pipe.enable_cache(config)
        assert not own_pipe.is_cache_enabled

    def test_two_at_once(self, own_pipe):
        own_pipe.enable_cache(CACHES["first block"])
        for enable in (own_pipe.enable_cache, lambda _: own_pipe.enable_taylorseer()):
            with pytest.raises(ValueError, match=r"disable_cache\(\)"):
                enable(CACHES["sea"])
        own_pipe.disable_taylorseer()
        assert own_pipe.is_cache_enabled
        own_pipe.disable_cache()
        own_pipe.enable_taylorseer()
        own_pipe.enable_taylorseer(interval=2)
        with pytest.raises(ValueError, match=r"disable_cache\(\)"):
            own_pipe.enable_cache(CACHES["sea"])
        own_pipe.disable_taylorseer()
        assert not own_pipe.is_cache_enabled

    def test_a_single_layer(self, own_pipe):
        own_pipe.enable_cache(CACHES["first block"])
        own_pipe.transformer.config.text_config.num_hidden_layers = 1
        with pytest.raises(ValueError, match="the transformer has one"):
            drawn(own_pipe)

    def test_layers_that_another_cache_has_replaced(self, own_pipe):
        language_model = own_pipe.transformer.model.language_model
        layers = language_model.layers

        def replace_layers(module, args, kwargs):
            if kwargs.get("routing") is not None:
                module.layers = nn.ModuleList([layers[0]])

        language_model.register_forward_pre_hook(replace_layers, with_kwargs=True)
        own_pipe.enable_cache(CACHES["first block"])
        with pytest.raises(ValueError, match="cache-dit"):
            drawn(own_pipe)

    @pytest.mark.parametrize(
        "config", [LAYERS["first block"], NOTHING["calibration"]], ids=["first block", "calibration"]
    )
    def test_measures_that_differ_between_processes(self, config, own_pipe):
        own_pipe._split_group = object()
        own_pipe.enable_cache(config)
        with pytest.raises(ValueError, match="context split"):
            drawn(own_pipe)
