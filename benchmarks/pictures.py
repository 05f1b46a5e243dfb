# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A picture plain, by every means that takes less, and by several of them.

    python benchmarks/pictures.py --num 20 --json benchmarks/results/pictures.json

On bagel-shapes, whose drawings and edits are judged, and at the middle width of random weights, whose adapter has learned nothing.
Pictures are drawn one at a time, in 49 steps where nothing else is said.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import INSTRUCTION, PROMPT, picture
from diffusers import FirstBlockCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from machine import machine
from peft import LoraConfig, get_peft_model_state_dict
from step_caches import ROOT, TAYLOR, Row, Task, cache, cells, check, make_middle, shapes_tasks

from diffusers_bagel import BagelPipeline
from diffusers_bagel.few_steps import FewSteps
from transformers_bagel import LORA_TARGETS


STEPS = 49
FEW_STEPS = 6


@contextmanager
def adapter(pipe: BagelPipeline, folder: Path) -> Iterator[None]:
    """A few-step adapter."""
    pipe.load_lora_weights(folder)
    try:
        yield
    finally:
        pipe.unload_lora_weights()


@contextmanager
def compiled(pipe: BagelPipeline) -> Iterator[None]:
    """What `pipe.compile()` chooses for this machine."""
    pipe.compile()
    try:
        yield
    finally:
        pipe.undo_compile()


@dataclass(frozen=True)
class Means:
    """
    Attributes:
        name (`str`)
        set_ups (`tuple`): What is done to the pipeline, each a context.
        changes (`dict`): Of the arguments of its call.
        counted (`str`): The means with as many forwards, where they cannot be counted.
    """

    name: str
    set_ups: tuple[Callable[[BagelPipeline], Any], ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    counted: str = ""


def every_means(folder: Path) -> Iterator[Means]:
    """All of them, and sums; `folder` has the adapter."""
    taylorseer = partial(cache, config=TaylorSeerCacheConfig(3, 5, **TAYLOR))
    held = {"guidance_tolerance": 0.01}
    # What is not given is the adapter's.
    few = {"num_inference_steps": None, "guidance_scale": None, "image_guidance_scale": None}
    own = partial(adapter, folder=folder)
    yield Means("plain")
    yield Means("`guidance_tolerance=0.01`", changes=held)
    yield Means("FirstBlock 0.05", (partial(cache, config=FirstBlockCacheConfig(0.05)),))
    yield Means("Sea 0.25", (partial(cache, config=SeaCacheConfig()),))
    yield Means("TaylorSeer 3, before 5, order 1", (taylorseer,))
    yield Means("few-step adapter", (own,), few)
    yield Means("`pipe.compile()`", (compiled,), counted="plain")
    yield Means("`pipe.compile()`, `guidance_tolerance=0.01`", (compiled,), held, "`guidance_tolerance=0.01`")
    yield Means("`pipe.compile()`, TaylorSeer", (compiled, taylorseer), counted="TaylorSeer 3, before 5, order 1")
    yield Means("few-step adapter, `pipe.compile()`", (own, compiled), few, "few-step adapter")


def measured(pipe: BagelPipeline, tasks: dict[str, Task], folder: Path) -> dict[str, dict[str, Any]]:
    """A row of each task for each means."""
    print(f"{'':48}" + "".join(f"   {name + ': forwards, s, CPU s, error, dB, right':>45}" for name in tasks))
    rows: dict[str, dict[str, Row]] = {}
    for means in every_means(folder):
        with ExitStack() as stack:
            for set_up in means.set_ups:
                stack.enter_context(set_up(pipe))
            for task in tasks.values():
                # The first calls make what all share, and compile.
                for call in task.calls[:2]:
                    pipe(output_type="latent", **(call | means.changes))
            rows[means.name] = {
                name: task.row(rows[means.counted][name].forwards if means.counted else None, **means.changes)
                for name, task in tasks.items()
            }
        found = rows[means.name].values()
        print(f"{means.name:48}" + "".join(f"   {cells(row):>45}" for row in found), flush=True)
    return {means: {name: asdict(row) for name, row in found.items()} for means, found in rows.items()}


def save_adapter(pipe: BagelPipeline, folder: str) -> None:
    """A few-step adapter that has learned nothing."""
    pipe.transformer.add_adapter(LoraConfig(r=16, target_modules=LORA_TARGETS["gen"]))
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
        few_steps=FewSteps.of(pipe, FEW_STEPS),
    )
    pipe.unload_lora_weights()


def middle(side: int) -> dict[str, Any]:
    """Rows of the middle width."""
    pipe = make_middle()
    size: dict[str, Any] = {"height": side, "width": side, "num_inference_steps": STEPS}
    calls: dict[str, dict[str, Any]] = {
        "drawing": {"prompt": PROMPT},
        "edit": {"prompt": INSTRUCTION, "image": picture(side)},
    }
    tasks = {name: Task(pipe, [call | size]) for name, call in calls.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(pipe, folder)
        return measured(pipe, tasks, Path(folder))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=20, help="drawings, and edits, of bagel-shapes; 0 leaves them out")
    parser.add_argument("--side", type=int, default=256, help="pixels at the middle width; 0 leaves it out")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    args = parser.parse_args(arguments)
    check(parser, args)
    tables: dict[str, Any] = machine(torch.get_num_threads()) | {"num": args.num, "side": args.side}
    if args.num:
        tables["shapes"] = measured(*shapes_tasks(args.num, STEPS), ROOT / "examples" / "shapes" / "six_steps")
    if args.side:
        tables["middle"] = middle(args.side)
    if args.json:
        args.json.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
