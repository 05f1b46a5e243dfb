# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The 7B model's sizes with random weights in bfloat16, on one GPU of 80 GB: `python benchmarks/gpu.py`.

What it computes takes the time that it takes with the published weights, but for where a text ends; pictures are noise.
Each section prints its own rows, so that a run that is cut off has told what it could.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import INSTRUCTION, PROMPT, Work, denoise, picture, random_ids
from diffusers import FlowMatchEulerDiscreteScheduler
from models import CHECKPOINT, IMAGE_SIZES, published_vae, write_tokens
from run import machine
from timing import default_device, median_and_spread, seconds_of, synchronize

from diffusers_bagel import BagelPipeline, denoising
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelProcessor, fork_cache


DTYPE = torch.bfloat16
NEW_TOKENS = 64
SECTIONS = ("steps", "drawing", "bounds", "text", "compiled", "casting", "offloading", "float8")
rows: list[dict[str, Any]] = []


def make_full_size(device: torch.device) -> BagelPipeline:
    """The pipeline of random weights, made where it stays; the tests' tokenizer, whose ids the configuration has."""
    ids = BagelConfig.from_pretrained(CHECKPOINT).to_dict()
    config = BagelConfig(**{name: value for name, value in ids.items() if name.endswith("_token_id")})
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    try:
        with device:
            transformer = BagelForConditionalGeneration(config).eval()
            vae = published_vae().eval()
    finally:
        torch.set_default_dtype(torch.float32)
    pipe = BagelPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        processor=BagelProcessor.from_pretrained(CHECKPOINT, **IMAGE_SIZES),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def note(name: str, seconds: float, **others: Any) -> None:
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    rows.append({"name": name, "seconds": seconds, "peak_gb": peak} | others)
    text = ", ".join(f"{key} {value:.4g}" for key, value in others.items())
    print(f"| {name} | {seconds:.4g} s | {peak:.2f} GB | {text} |", flush=True)


def timed(name: str, run: Callable[[], object], repeats: int = 1, warm: bool = True, **others: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if warm:
        (times,) = seconds_of((run,), repeats, default_device())
    else:
        start = time.perf_counter()
        run()
        synchronize(default_device())
        times = [time.perf_counter() - start]
    seconds, spread = median_and_spread(times)
    note(name, seconds, spread=spread, **others)
    return seconds


def steps(pipe: BagelPipeline) -> None:
    """A denoising step at 1024 px beside its floor."""
    time_steps(step_works(pipe))


def step_works(pipe: BagelPipeline) -> dict[str, Work]:
    kinds = ((1, "drawing, 1 branch"), (2, "drawing, 2 branches"), (3, "edit, 3 branches"))
    return {name: denoise(pipe, 1024, branches) for branches, name in kinds}


def time_steps(works: dict[str, Work], suffix: str = "") -> None:
    for name, work in works.items():
        times, floors = seconds_of((work.run, work.floor), 5, default_device())
        (seconds, spread), (floor, _) = median_and_spread(times), median_and_spread(floors)
        note(f"step, {name}{suffix}", seconds, spread=spread, floor=floor, ratio=seconds / floor)


def drawing(pipe: BagelPipeline) -> None:
    """Whole pictures of 1024 px in 49 steps."""
    draw = lambda **settings: pipe(PROMPT, height=1024, width=1024, **settings)  # noqa: E731
    timed("drawing, 1024 px, 49 steps", draw, warm=False)
    timed("edit, 1024 px, 49 steps", lambda: pipe(INSTRUCTION, image=picture(1024)), warm=False)
    pipe.enable_taylorseer()
    timed("drawing, 1024 px, 49 steps, TaylorSeer", draw, warm=False)
    pipe.disable_taylorseer()
    timed("drawing, 512 px, 49 steps", lambda: pipe(PROMPT, height=512, width=512), warm=False)


def bounds(pipe: BagelPipeline) -> None:
    """Branches together in a forward, and one by one: what decides `MAX_STEP_TOKENS`."""
    together = denoising.MAX_STEP_TOKENS
    for pixels in (256, 512, 1024):
        for limit, name in ((together, "together"), (1, "one by one")):
            denoising.MAX_STEP_TOKENS = limit
            run = denoise(pipe, pixels, 3).run
            timed(f"step, edit, {pixels} px, 3 branches {name}", run, repeats=5)
    denoising.MAX_STEP_TOKENS = together


@torch.no_grad()
def text(pipe: BagelPipeline) -> None:
    """Reading a text and a picture, and writing."""
    model = pipe.transformer
    for batch in (1, 16):
        ids = random_ids(pipe, batch, 1025)
        read = lambda ids=ids: model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1)  # noqa: E731
        seconds = timed(f"read 1,024 tokens, batch {batch}", read, repeats=3)
        rows[-1]["tokens_per_second"] = batch * 1024 / seconds
        cache = read().past_key_values
        write = lambda ids=ids, cache=cache: write_tokens(model, ids, fork_cache(cache), NEW_TOKENS)  # noqa: E731
        seconds = timed(f"write {NEW_TOKENS} tokens after 1,024, batch {batch}", write, repeats=2)
        print(f"    {batch * NEW_TOKENS / seconds:.1f} tokens/s")
    ids = random_ids(pipe, 1, 1025)
    static = lambda: model.generate(  # noqa: E731
        input_ids=ids,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation="static",
    )
    seconds = timed(f"read 1,025 and write {NEW_TOKENS} tokens, static cache, compiled by the library", static)
    question = [{"type": "image", "image": picture(1024)}, {"type": "text", "text": "what is it?"}]
    inputs = pipe.processor.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    timed("read a picture of 980 px", lambda: model(**inputs, use_cache=True, logits_to_keep=1), repeats=3)


def compiled(pipe: BagelPipeline, suffix: str = "") -> None:
    # Behind the recording of the floors, which needs the modules to be called.
    works = step_works(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    timed(f"compiling, first drawing, 2 steps{suffix}", lambda: pipe(PROMPT, num_inference_steps=2), warm=False)
    time_steps(works, f", layers compiled{suffix}")
    timed(f"drawing, 1024 px, 49 steps, layers compiled{suffix}", lambda: pipe(PROMPT), warm=False)
    for module in pipe.transformer.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()


def casting(pipe: BagelPipeline) -> None:
    pipe.enable_layerwise_casting()
    torch.cuda.empty_cache()
    timed("drawing, 1024 px, 10 steps, float8 while it rests", lambda: pipe(PROMPT, num_inference_steps=10))


def offloading(pipe: BagelPipeline) -> None:
    """Groups of layers on the CPU, brought by a stream while the one before computes."""
    pipe.enable_group_offload("cuda", offload_type="block_level", num_blocks_per_group=2, use_stream=True)
    torch.cuda.empty_cache()
    timed("drawing, 1024 px, 10 steps, groups of 2 layers offloaded", lambda: pipe(PROMPT, num_inference_steps=10))


def float8(pipe: BagelPipeline) -> None:
    """Products in float8, weights and inputs rounded, compiled: the layers only, as `quantization_config` rounds them."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(
        pipe.transformer.model.language_model.layers,
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    )
    torch.cuda.empty_cache()
    compiled(pipe, ", float8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    start = time.perf_counter()
    pipe = make_full_size(default_device())
    note("making the model", time.perf_counter() - start)
    for section in args.sections:
        globals()[section](pipe)
        if args.json:
            args.json.write_text(json.dumps(machine(None) | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
