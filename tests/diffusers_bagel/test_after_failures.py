"""After an error, an interrupt or a full memory the next call draws what a fresh pipeline draws, however it is set up."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig

from diffusers_bagel import BagelPipeline
from diffusers_bagel.guidance import TEXT_TO_IMAGE
from tests.conftest import CHECKPOINT, golden_image, load_processor
from tests.diffusers_bagel.conftest import SMALL, paused, seeded
from transformers_bagel import LORA_TARGETS


PLACEMENTS: dict[str, Callable[[BagelPipeline], object]] = {
    "whole": lambda pipe: None,
    "models": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "modules": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "groups of leaves": lambda pipe: pipe.enable_group_offload("cpu", offload_type="leaf_level"),
    "groups of blocks": lambda pipe: pipe.enable_group_offload("cpu", num_blocks_per_group=1),
    "cast layers": lambda pipe: pipe.enable_layerwise_casting(),
}
ADAPTERS: dict[str, Callable[[BagelPipeline], object]] = {
    "no adapter": lambda pipe: None,
    "an adapter": lambda pipe: add_adapter(pipe),
    "a fused adapter": lambda pipe: (add_adapter(pipe), pipe.fuse_lora(lora_scale=0.5)),
}
SPEED: dict[str, Callable[[BagelPipeline], object]] = {
    "plain": lambda pipe: None,
    "TaylorSeer": lambda pipe: pipe.enable_taylorseer(interval=2, warmup_steps=1),
    "first block": lambda pipe: pipe.enable_cache(FirstBlockCacheConfig(0.2)),
    "compiled": lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"),
}
# What fails, and in which call of which module: the second layer reads the prompt once, and then denoises.
LAYER = "model.language_model.layers.1"
FAILURES: dict[str, tuple[str, int, BaseException]] = {
    "reading": (LAYER, 0, RuntimeError("in the prompt")),
    "denoising": (LAYER, 2, torch.OutOfMemoryError("no memory is left")),
    "an interrupt": (LAYER, 1, KeyboardInterrupt()),
    "decoding": ("decoder.mid_block", 0, torch.OutOfMemoryError("no memory is left")),
}
CALL = SMALL | {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "pt"}


def add_adapter(pipe: BagelPipeline) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=LORA_TARGETS["both"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "one")


def make_pipe(model) -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, transformer=copy.deepcopy(model), processor=load_processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: BagelPipeline, **settings) -> torch.Tensor:
    return pipe("a red circle", **(CALL | {"generator": seeded(0)} | settings)).images


def fail_once(pipe: BagelPipeline, name: str, call: int, error: BaseException) -> None:
    owner = pipe.vae if name.startswith("decoder") else pipe.transformer
    calls = itertools.count()

    def fail(module, args):
        if next(calls) == call:
            raise error

    hook = owner.get_submodule(name).register_forward_pre_hook(fail)
    try:
        with pytest.raises(type(error)):
            drawn(pipe, **settings_of(pipe, 0.1))
    finally:
        hook.remove()


def settings_of(pipe: BagelPipeline, scale: float) -> dict:
    return {"attention_kwargs": {"scale": scale}} if getattr(pipe.transformer, "peft_config", None) else {}


# Compiling takes seconds.
COMBINATIONS = [
    pytest.param(*names, marks=[pytest.mark.slow] * (names[2] == "compiled"))
    for names in itertools.product(PLACEMENTS, ADAPTERS, SPEED)
]


@pytest.mark.parametrize(("placement", "adapters", "speed"), COMBINATIONS)
def test_the_next_call_equals_one_of_a_fresh_pipeline(placement, adapters, speed, model, monkeypatch):
    # accelerate 1.15 cannot offload any model to "cpu:0", the name that diffusers gives this stand-in for a GPU.
    offload = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **kw: offload(model, "cpu", **kw))
    pipe = make_pipe(model)
    for set_up in (ADAPTERS[adapters], PLACEMENTS[placement], SPEED[speed]):
        set_up(pipe)
    expected = drawn(pipe)
    for failure in FAILURES.values():
        fail_once(pipe, *failure)
        assert torch.equal(drawn(pipe), expected)


def test_adapters_and_speed_change_the_pictures_that_are_compared(model):
    pictures = []
    for set_up in (
        ADAPTERS["no adapter"],
        ADAPTERS["an adapter"],
        ADAPTERS["a fused adapter"],
        *list(SPEED.values())[1:3],
    ):
        pipe = make_pipe(model)
        set_up(pipe)
        pictures.append(drawn(pipe))
    assert all(not torch.equal(*pair) for pair in itertools.combinations(pictures, 2))


class TestScaleOfACall:
    @pytest.fixture
    def adapted(self, model) -> BagelPipeline:
        pipe = make_pipe(model)
        add_adapter(pipe)
        return pipe

    def test_threads_with_several_scales_draw_as_alone(self, adapted):
        scales = [None, 1.0, 0.25, -2.0]
        settings = [{} if scale is None else {"attention_kwargs": {"scale": scale}} for scale in scales] * 4
        settings[0] |= {"think": True, "max_think_tokens": 4}
        singles = [drawn(adapted, **own) for own in settings]
        assert not torch.equal(singles[1], singles[2])
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(lambda own: drawn(adapted, **own), settings))
        assert all(map(torch.equal, together, singles))
        assert torch.equal(drawn(adapted), singles[1])

    def test_a_call_inside_another_has_its_own_scale(self, adapted):
        alone, quarter = drawn(adapted), drawn(adapted, attention_kwargs={"scale": 0.25})
        with paused(drawn, adapted, attention_kwargs={"scale": 0.25}) as outer:
            assert torch.equal(drawn(adapted), alone)
        assert torch.equal(outer.result(), quarter)
        assert torch.equal(drawn(adapted), alone)

    def test_weights_that_a_callback_sets_stay(self, adapted):
        def set_weight(pipeline, step, timestep, tensors):
            pipeline.set_adapters("one", 0.5)
            return tensors

        drawn(adapted, attention_kwargs={"scale": 0.25}, callback_on_step_end=set_weight)
        found = drawn(adapted)
        adapted.set_adapters("one", 0.5)
        assert torch.equal(found, drawn(adapted))

    def test_the_parts_of_a_call_know_the_scale(self, adapted):
        prompt = adapted.encode_conversation([{"role": "user", "content": "a red circle"}])
        keys = [
            adapted.prepare_contexts([prompt], [TEXT_TO_IMAGE], attention_kwargs=kwargs)[0][0]["full"]
            .cache.layers[1]
            .keys
            for kwargs in (None, {"scale": 1.0}, {"scale": 0.0})
        ]
        assert torch.equal(keys[0], keys[1]) and not torch.equal(keys[0], keys[2])


class TestPixels:
    @pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_the_vae_breaks_is_no_picture(self, own_pipe, output_type, value):
        own_pipe.vae.decoder.conv_out.bias.data[0] = value
        with pytest.raises(ValueError, match="VAE decoded latents to NaN"):
            drawn(own_pipe, output_type=output_type)

    def test_what_the_vae_breaks_while_encoding_is_said_before_drawing(self, own_pipe, forwards):
        own_pipe.vae.encoder.conv_out.bias.data[0] = float("nan")
        seen = forwards(own_pipe)
        with pytest.raises(ValueError, match="VAE encoded an image to NaN"):
            own_pipe("now blue", image=golden_image("square"), generator=seeded(0), num_inference_steps=2)
        assert not seen.reading and not seen.denoising
