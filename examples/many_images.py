# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Draw the lines of a file with several processes: each its share of the pictures, or all of them the same picture.

    accelerate launch --num_processes 8 examples/many_images.py prompts.txt pictures
    accelerate launch --num_processes 8 examples/many_images.py prompts.txt pictures --split latents
    accelerate launch --num_processes 4 examples/many_images.py prompts.txt pictures --split layers

The pictures are the same whatever is split: line N has the seed N + SEED. See docs/growth.md for what to choose.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.distributed import DistributedConfig

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelForConditionalGeneration


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="a text file, a prompt a line")
    parser.add_argument("folder", type=Path, help="where to write 00000.png and so on")
    parser.add_argument("--model", default="ByteDance-Seed/BAGEL-7B-MoT")
    parser.add_argument("--split", choices=("pictures", "latents", "layers"), default="pictures")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--steps", type=int, default=49)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="not the GPUs")
    return parser.parse_args(arguments)


def load(args: argparse.Namespace, state: PartialState) -> BagelPipeline:
    """The pipeline, whole or as this process's part."""
    dtype = getattr(torch, args.dtype)
    components = {}
    if args.split == "layers":
        components["transformer"] = BagelForConditionalGeneration.from_pretrained(
            args.model, dtype=dtype, distributed_config=DistributedConfig(tp_plan="auto")
        )
    pipe = BagelPipeline.from_pretrained(args.model, dtype=dtype, **components).to(state.device)
    if args.split == "latents":
        pipe.enable_context_split()
    pipe.set_progress_bar_config(disable=not state.is_main_process)
    return pipe


def draw(pipe: BagelPipeline, lines: list[tuple[int, str]], args: argparse.Namespace, writes: bool) -> None:
    for number, prompt in lines:
        image = pipe(
            prompt,
            height=args.size,
            width=args.size,
            num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(args.seed + number),
        ).images[0]
        if writes:
            image.save(args.folder / f"{number:05}.png")


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    state = PartialState(cpu=args.cpu)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = list(enumerate(args.prompts.read_text(encoding="utf-8").splitlines()))
    pipe = load(args, state)
    if args.split == "pictures":
        with state.split_between_processes(lines) as own:
            draw(pipe, own, args, writes=True)
    else:
        draw(pipe, lines, args, writes=state.is_main_process)
    # The groups of a split model must be gone before the processes part.
    del pipe
    gc.collect()
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
