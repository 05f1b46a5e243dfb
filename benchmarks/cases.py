# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What is measured. A case makes its inputs, and returns what to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch._inductor.config
from floor import floor_of, recording
from models import write_tokens
from PIL import Image
from transformers import CompileConfig, StaticCache

from diffusers_bagel import BagelPipeline
from diffusers_bagel.contexts import BagelContext, ContextReader
from diffusers_bagel.denoising import Denoiser
from diffusers_bagel.guidance import EDITING, TEXT_TO_IMAGE
from diffusers_bagel.inputs import as_conversations
from transformers_bagel import BagelDataCollator, fork_cache
from transformers_bagel.segments import EncodedSegment


PROMPT = "a red circle left of a large blue square on a yellow ground, drawn with a soft pencil in the evening"
INSTRUCTION = "make the circle green and leave everything else as it is"
NEW_TOKENS = 32
# Denoising steps of whole images.
STEPS = 10
PIXELS = (256, 512, 1024)
# Prefix of the published code's decoding figure, and a long one.
PREFIXES = (128, 2400, 4096)
# Prompts of a call.
BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Work:
    """
    Attributes:
        run (`Callable`): To be timed.
        floor (`Callable`): Its matrix products, convolutions and attentions alone.
        count (`int`): Units of a run.
        unit (`str`): Such as `"token"`.
    """

    run: Callable[[], object]
    floor: Callable[[], None]
    count: int
    unit: str


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        group (`str`): By which cases are chosen.
        name (`str`)
        make (`Callable[[BagelPipeline], Work]`)
    """

    group: str
    name: str
    make: Callable[[BagelPipeline], Work]


def cases() -> Iterator[Case]:
    """All of them, in the order of the table."""
    for batch in (1, 4):
        for length in (PREFIXES[0], PREFIXES[-1]):
            name = f"{length} tokens, batch {batch}"
            yield Case("prefill", name, partial(prefill, length=length, batch=batch))
    for batch in (1, 4):
        for length in PREFIXES:
            name = f"after {length} tokens, batch {batch}"
            yield Case("decode", name, partial(decode, length=length, batch=batch))
    for length in PREFIXES:
        name = f"after {length} tokens, batch 1, static cache, compiled"
        yield Case("compiled", name, partial(decode_compiled, length=length))
    for pixels in PIXELS:
        for branches in (1, 2):
            name = f"text to image, {pixels} px, {branches} branch{'es' * (branches > 1)}"
            yield Case("denoise", name, partial(denoise, pixels=pixels, branches=branches))
    for pixels in PIXELS:
        name = f"edit, {pixels} px, 3 branches"
        yield Case("denoise", name, partial(denoise, pixels=pixels, branches=3))
    for pixels in PIXELS[:2]:
        yield Case("contexts", f"edit, {pixels} px: full", partial(prefill_edit, pixels=pixels))
        yield Case("contexts", f"edit, {pixels} px: all three", partial(contexts, pixels=pixels))
    yield from whole_images()
    for pixels in PIXELS[:2]:
        yield Case("vae", f"encode {pixels} px", partial(encode, pixels=pixels))
        yield Case("vae", f"decode {pixels} px", partial(decode_latents, pixels=pixels))
    for checkpointing in (False, True):
        name = f"packed row, checkpointing {'on' if checkpointing else 'off'}"
        yield Case("training", name, partial(training, checkpointing=checkpointing))


def whole_images() -> Iterator[Case]:
    """Alone, and in batches."""
    yield Case("image", f"text to image, 256 px, {STEPS} steps", partial(image, pixels=256, edits=False))
    yield Case("image", f"edit, 256 px, {STEPS} steps", partial(image, pixels=256, edits=True))
    for taylorseer in (False, True):
        name = "text to image, 256 px, 49 steps" + ", TaylorSeer" * taylorseer
        yield Case("image", name, partial(image, pixels=256, edits=False, steps=49, taylorseer=taylorseer))
    for batch in BATCHES:
        yield Case("batch", f"plans of {NEW_TOKENS - 1} tokens, batch {batch}", partial(plans, batch=batch))
    for pixels, thinks in ((128, False), (256, False), (256, True)):
        for batch in BATCHES:
            name = f"text to image, {pixels} px, {STEPS} steps{', with plans' * thinks}, batch {batch}"
            yield Case("batch", name, partial(images, pixels=pixels, batch=batch, thinks=thinks))


def work(pipe: BagelPipeline, run: Callable[[], object], count: int, unit: str) -> Work:
    """A run with its floor, which is what one run of it calls."""
    with recording(pipe.transformer, pipe.vae) as calls:
        run()
    return Work(run, floor_of(calls, pipe.transformer.dtype, pipe.transformer.device), count, unit)


def random_ids(pipe: BagelPipeline, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # Ids of the tests' tokenizer that are words.
    return torch.randint(5, 400, (batch, length), generator=generator).to(pipe.transformer.device)


@torch.no_grad()
def prefill(pipe: BagelPipeline, length: int, batch: int) -> Work:
    """A text, up to the scores of the next token."""
    ids = random_ids(pipe, batch, length)

    @torch.no_grad()
    def run() -> None:
        pipe.transformer(input_ids=ids, use_cache=True, logits_to_keep=1)

    return work(pipe, run, ids.numel(), "token")


@torch.no_grad()
def decode(pipe: BagelPipeline, length: int, batch: int) -> Work:
    """`generate()` after a text that is in the cache already."""
    ids = random_ids(pipe, batch, length + 1)
    cache = pipe.transformer(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    def run() -> None:
        write_tokens(pipe.transformer, ids, fork_cache(cache), NEW_TOKENS)

    return work(pipe, run, batch * NEW_TOKENS, "token")


@torch.no_grad()
def decode_compiled(pipe: BagelPipeline, length: int) -> Work:
    """`generate()` with a static cache and a compiled forward, whose products the compiler may choose."""
    ids = random_ids(pipe, 1, length + 1)
    cache = StaticCache(config=pipe.transformer.config.get_text_config(), max_cache_len=length + 1 + NEW_TOKENS)
    pipe.transformer(input_ids=ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    settings = CompileConfig(mode="default", dynamic=False)
    # The library compiles on accelerators only, unless it is told.
    settings._compile_all_devices = True

    def run(**kwargs: Any) -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
        write_tokens(pipe.transformer, ids, cache, NEW_TOKENS, **kwargs)

    with recording(pipe.transformer) as calls:
        run(disable_compile=True)
    floor = floor_of(calls, pipe.transformer.dtype, pipe.transformer.device)

    def run_compiled() -> None:
        # As TORCHINDUCTOR_MAX_AUTOTUNE and TORCHINDUCTOR_FREEZING do: on a CPU the compiler then has products of its own.
        with torch._inductor.config.patch(max_autotune=True, freezing=True):
            run(compile_config=settings)

    return Work(run_compiled, floor, NEW_TOKENS, "token")


def picture(pixels: int) -> Image.Image:
    return Image.effect_noise((pixels, pixels), 64).convert("RGB")


@torch.no_grad()
def denoise(pipe: BagelPipeline, pixels: int, branches: int) -> Work:
    """A step with its guidance, the contexts being there."""
    guidance = EDITING if branches == 3 else TEXT_TO_IMAGE.with_changes(text_scale=1.0 if branches == 1 else None)
    prompts = [prompt_of(pipe, pixels, edits=branches == 3)]
    compared, _ = pipe.prepare_contexts(prompts, [guidance])
    denoiser = Denoiser(pipe.transformer, compared, [grid_of(pipe, pixels)], [guidance])
    noise = pipe.prepare_latents([grid_of(pipe, pixels)], [None])
    # Inside all intervals of guidance.
    sigma = torch.tensor(0.9)

    @torch.no_grad()
    def run() -> None:
        denoiser.velocity(noise, sigma, sigma.to(noise.device), guidance.text_scale)

    return work(pipe, run, 1, "step")


def grid_of(pipe: BagelPipeline, pixels: int) -> tuple[int, int]:
    side = pixels // pipe.vae_scale_factor
    return side, side


def prompt_of(pipe: BagelPipeline, pixels: int, edits: bool) -> list[EncodedSegment]:
    """What a picture is drawn from, its own latents being there."""
    image = picture(pixels) if edits else None
    (conversation,) = as_conversations(INSTRUCTION if edits else PROMPT, image, None)
    return [
        replace(segment, latents=pipe.encode_image(segment.pixels)) if segment.segment.type == "vae_image" else segment
        for segment in pipe.encode_conversation(conversation)
    ]


@torch.no_grad()
def prefill_edit(pipe: BagelPipeline, pixels: int) -> Work:
    """The longest context of an edit, its picture being encoded: both towers' tokens and the text in one forward."""
    prompt = prompt_of(pipe, pixels, edits=True)
    reader = ContextReader(pipe.transformer, pipe.processor, pipe.transformer.device)

    @torch.no_grad()
    def run() -> None:
        reader.read([BagelContext()], [prompt])

    return work(pipe, run, 1, "context")


@torch.no_grad()
def contexts(pipe: BagelPipeline, pixels: int) -> Work:
    """All contexts of an edit, as denoising reads them. Their floor is that of the longest one, which they share in."""
    prompt = prompt_of(pipe, pixels, edits=True)

    @torch.no_grad()
    def run() -> None:
        compared, _ = pipe.prepare_contexts([prompt], [EDITING])
        Denoiser(pipe.transformer, compared, [grid_of(pipe, pixels)], [EDITING])

    return Work(run, prefill_edit(pipe, pixels).floor, 1, "set")


def image(pipe: BagelPipeline, pixels: int, edits: bool, steps: int = STEPS, taylorseer: bool = False) -> Work:
    """The whole pipeline."""
    if taylorseer:
        pipe.enable_taylorseer()

    def run() -> None:
        pipe(
            INSTRUCTION if edits else PROMPT,
            image=picture(pixels) if edits else None,
            height=pixels,
            width=pixels,
            num_inference_steps=steps,
        )

    return work(pipe, run, 1, "image")


def prompts_of(batch: int) -> list[str]:
    """Prompts of different lengths."""
    words = PROMPT.split()
    return [" ".join(words[2 * index :]) for index in range(batch)]


@torch.no_grad()
def plans(pipe: BagelPipeline, batch: int) -> Work:
    """Contexts with plans, up to the denoising."""
    conversations = as_conversations(prompts_of(batch), None, None)
    prompts = [pipe.encode_conversation(conversation, think=True) for conversation in conversations]

    @torch.no_grad()
    def run() -> None:
        pipe.prepare_contexts(prompts, [TEXT_TO_IMAGE] * batch, think=True, max_think_tokens=NEW_TOKENS)

    return work(pipe, run, batch, "plan")


def images(pipe: BagelPipeline, pixels: int, batch: int, thinks: bool) -> Work:
    """The whole pipeline, for several prompts in one call."""

    def run() -> None:
        pipe(
            prompts_of(batch),
            height=pixels,
            width=pixels,
            num_inference_steps=STEPS,
            think=thinks,
            max_think_tokens=NEW_TOKENS,
        )

    return work(pipe, run, batch, "image")


@torch.no_grad()
def encode(pipe: BagelPipeline, pixels: int) -> Work:
    values = torch.randn(3, pixels, pixels)

    @torch.no_grad()
    def run() -> None:
        pipe.encode_image(values)

    return work(pipe, run, 1, "image")


@torch.no_grad()
def decode_latents(pipe: BagelPipeline, pixels: int) -> Work:
    grid = grid_of(pipe, pixels)
    latents = pipe.prepare_latents([grid], [None])

    @torch.no_grad()
    def run() -> None:
        pipe.decode_latents(latents, grid, "pt")

    return work(pipe, run, 1, "image")


def whole_collator(pipe: BagelPipeline, **settings: Any) -> BagelDataCollator:
    """One that drops no part of a sample."""
    generator = torch.Generator().manual_seed(0)
    dropouts: dict[str, Any] = dict.fromkeys(("text_dropout", "vit_dropout", "vae_dropout"), 0.0)
    return BagelDataCollator(pipe.processor, vae=pipe.vae, generator=generator, **dropouts, **settings)


def training(pipe: BagelPipeline, checkpointing: bool) -> Work:
    """Forward, backward and AdamW on a drawing of 512 pixels, an edit of 256, and a question about a picture.

    The floor computes nothing twice, also beside checkpointing.
    """
    text = PROMPT * 2

    def sample(question: list, answer: list) -> dict[str, Any]:
        def part(value: str | int) -> dict[str, Any]:
            if isinstance(value, str):
                return {"type": "text", "text": value}
            return {"type": "image", "image": picture(value)}

        turns = (("user", question), ("assistant", answer))
        return {"messages": [{"role": role, "content": [part(item) for item in parts]} for role, parts in turns]}

    samples = [sample([text], [512]), sample([256, INSTRUCTION], [256]), sample([256, text], [text])]
    batch = whole_collator(pipe)(samples).to(pipe.transformer.device)
    model = pipe.transformer.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters())

    def run() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with recording(model) as calls:
        model(**batch)
    model.zero_grad()
    floor = floor_of(calls, model.dtype, model.device, backward=True)
    return Work(run, floor, batch["input_ids"].numel(), "token")
