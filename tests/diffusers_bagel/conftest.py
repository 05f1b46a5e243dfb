"""The pipeline of the tiny checkpoint, and how the tests call it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, DEVICE, GOLDEN, conversation, load_processor, max_error
from transformers_bagel.segments import EncodedSegment


SMALL = {"height": 48, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
EDIT = {"num_inference_steps": 3, "output_type": "latent"}
TEXTS = ["a", "a red circle", "two small yellow squares", "many small yellow squares left of a large green triangle"]
PLAN = {"think": True, "max_think_tokens": 8}
# Texts alone, one image, several, texts between images, an image at the end, several turns; in no order of length.
MIXED = [
    conversation(["@wide", "make it green"]),
    conversation(["a red circle"]),
    conversation(["@square", "and", "@tall", "join them, side by side"]),
    conversation(["many small yellow squares left of a large green triangle"]),
    conversation(["make it like", "@square"]),
    [*conversation(["a red circle"]), *conversation(["@tall", "now blue"])],
]


def seeded(*seeds: int):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(generators) == 1 else generators


@pytest.fixture(scope="session")
def pipe(model, processor) -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, transformer=model, processor=processor).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def own_pipe(model) -> BagelPipeline:
    """A pipeline that a test may change."""
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, transformer=copy.deepcopy(model), processor=load_processor())
    pipe.to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def golden_arguments(case: dict, inputs: Path = GOLDEN / "inputs") -> dict:
    """Parameters of an image case of a golden set, published names, as arguments of the pipeline."""
    params = case["params"]
    texts = [item for item in case["inputs"] if not item.startswith("@")]
    images = [Image.open(inputs / f"{item[1:]}.png") for item in case["inputs"] if item.startswith("@")]
    return {
        "prompt": texts[0],
        "image": images or None,
        "height": case["shape"][0],
        "width": case["shape"][1],
        "num_inference_steps": params["num_timesteps"] - 1,
        "guidance_scale": params["cfg_text_scale"],
        "image_guidance_scale": params["cfg_img_scale"],
        "cfg_interval": tuple(params["cfg_interval"]),
        "cfg_renorm_type": params["cfg_renorm_type"],
        "cfg_renorm_min": params["cfg_renorm_min"],
        "think": case.get("think", False),
        "max_think_tokens": case.get("max_think_tokens", 1024),
        "vae_sample_mode": "argmax",
    }


def encoded(pipe: BagelPipeline, messages: list[dict], think: bool = False) -> list[EncodedSegment]:
    """What a conversation is drawn from, with the latents of its images."""
    return [
        replace(segment, latents=pipe.encode_image(segment.pixels, vae_sample_mode="argmax"))
        if segment.segment.type == "vae_image"
        else segment
        for segment in pipe.encode_conversation(messages, think)
    ]


def close(batch: torch.Tensor, single: torch.Tensor) -> bool:
    return max_error(batch, single) <= 1e-5 * single.abs().max().item()


def assert_equals_single_runs(pipe: BagelPipeline, messages: list, **settings) -> None:
    """Each conversation of a batch gives the image and the plan that it gives alone."""
    batch = pipe(messages=messages, generator=seeded(*range(len(messages))), **settings)
    for index, item in enumerate(messages):
        single = pipe(messages=item, generator=seeded(index), **settings)
        assert close(batch.images[index], single.images[0])
        if settings.get("think"):
            assert batch.texts[index] == single.texts[0]


@contextmanager
def paused(call: Callable, *args, **kwargs) -> Iterator[Future]:
    """A call of another thread, which waits in its first step for the end of the block; then it has its result."""
    begun, ended = threading.Event(), threading.Event()

    def wait(pipeline, step, timestep, tensors):
        begun.set()
        assert ended.wait(60)
        return tensors

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(call, *args, callback_on_step_end=wait, **kwargs)
        assert begun.wait(60)
        try:
            yield running
        finally:
            ended.set()
        running.result()


@dataclass
class Forwards:
    """Arguments of the forwards of a transformer that read, of its calls of `generate`, and of forwards that denoise."""

    reading: list[dict] = field(default_factory=list)
    writing: list[dict] = field(default_factory=list)
    denoising: list[dict] = field(default_factory=list)

    @property
    def branches(self) -> list[int]:
        """Of each denoising forward."""
        return [len(kwargs["latent_grid_hw"]) for kwargs in self.denoising]


@pytest.fixture
def forwards(monkeypatch) -> Iterator[Callable[[BagelPipeline], Forwards]]:
    """Watch what a pipeline asks its transformer for."""
    hooks = []

    def watch(pipe: BagelPipeline) -> Forwards:
        seen = Forwards()
        is_writing: list[bool] = []
        generate = pipe.transformer.generate

        def note(module, args, kwargs):
            if kwargs.get("input_ids") is not None and not is_writing:
                seen.reading.append(kwargs)
            elif kwargs.get("latents") is not None:
                seen.denoising.append(kwargs)

        def watched_generate(**kwargs):
            seen.writing.append(kwargs)
            is_writing.append(True)
            sequences = generate(**kwargs)
            is_writing.clear()
            return sequences

        hooks.append(pipe.transformer.register_forward_pre_hook(note, with_kwargs=True))
        monkeypatch.setattr(pipe.transformer, "generate", watched_generate)
        return seen

    yield watch
    for hook in hooks:
        hook.remove()
