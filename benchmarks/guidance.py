# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What guidance costs, and what leaving it out changes: `python benchmarks/guidance.py --json benchmarks/results/guidance.json`.

Three tables: pictures of bagel-shapes with branches that are held, beside other ways of leaving them out; calls of several prompts
that have something in common, with and without reading it once; attention of two branches to the prefix that they share, apart
and in one. Seconds are those of the processor, on one thread; what is compared in the last two takes turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cases import INSTRUCTION, picture, prompts_of
from machine import machine
from models import make_pipeline
from refusals import need_at_least, need_output
from timing import least_processor_seconds
from torch.nn import functional


SHAPES = Path(__file__).parents[1] / "examples" / "shapes"
sys.path.insert(0, str(SHAPES))

from asking import BATCH_SIZE, DRAWING, EDITING, MAX_TOKENS  # noqa: E402
from evaluate import counted_forwards  # noqa: E402
from judge import draw_cases, edit_cases, is_drawn, is_edited  # noqa: E402
from world import render  # noqa: E402

from diffusers_bagel import BagelPipeline, denoising, pipeline_bagel  # noqa: E402
from diffusers_bagel.denoising import Drawing  # noqa: E402
from diffusers_bagel.guidance import BagelGuidance, HeldBranch, HeldBranches  # noqa: E402


TASKS = ("draw_full", "relation", "edit")
TOLERANCES = (0.005, 0.01, 0.02, 0.05)
# Of the other ways: cosines from which a branch is dropped, and steps of which one is computed.
SIMILARITIES = (0.97, 0.99)
INTERVALS = (2, 3, 5)


class Dropped(HeldBranches):
    """A branch is taken for the full one, for good, from the step on at which the two point the same way."""

    def __init__(self, similarity: float):
        super().__init__()
        self.similarity = similarity

    def due(self, guidance: BagelGuidance, branches: dict[str, int], sigma: torch.Tensor) -> set[int]:
        return {branch for name, branch in branches.items() if name not in self._held}

    def update(self, guidance: BagelGuidance, velocities: dict[str, torch.Tensor]) -> None:
        full = velocities["full"]
        for name in velocities.keys() - {"full"}:
            if functional.cosine_similarity(full.flatten(), velocities[name].flatten(), dim=0) >= self.similarity:
                self._held[name] = HeldBranch(torch.zeros_like(full), 0.0)


class EveryNth(HeldBranches):
    """A branch is computed at one step in so many, and held in between."""

    def __init__(self, interval: int):
        super().__init__()
        self.interval = interval
        self.step = -1

    def due(self, guidance: BagelGuidance, branches: dict[str, int], sigma: torch.Tensor) -> set[int]:
        self.step += 1
        return {branch for name, branch in branches.items() if name == "full" or self.step % self.interval == 0}

    def update(self, guidance: BagelGuidance, velocities: dict[str, torch.Tensor]) -> None:
        for name in velocities.keys() - {"full"}:
            self._held[name] = HeldBranch(velocities["full"] - velocities[name], 0.0)


def ways() -> Iterator[tuple[str, dict[str, Any], Callable[[], HeldBranches]]]:
    """Names, settings of the pipeline's call, and what makes the state of an image."""
    yield "every branch at every step", {}, HeldBranches
    for tolerance in TOLERANCES:
        yield f"guidance_tolerance={tolerance}", {"guidance_tolerance": tolerance}, HeldBranches
    for interval in INTERVALS:
        yield f"held, computed at one step in {interval}", {}, partial(EveryNth, interval)
    for similarity in SIMILARITIES:
        yield f"dropped from a cosine of {similarity} on", {}, partial(Dropped, similarity)


def drawn(pipe: BagelPipeline, task: str, num: int, settings: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Latents of the cases of a task, and the share of pictures that are right."""
    cases: Sequence[Any] = edit_cases(num) if task == "edit" else draw_cases(task, num)
    is_right: Callable[[Any, Any], bool] = is_drawn
    found, right = [], 0
    for start in range(0, num, BATCH_SIZE):
        batch = cases[start : start + BATCH_SIZE]
        own = settings | {"generator": [torch.Generator().manual_seed(start + index) for index in range(len(batch))]}
        if task == "edit":
            own |= EDITING | {"image": [[render(case.scene)] for case in batch]}
            own["prompt"], is_right = [case.instruction for case in batch], is_edited
        else:
            own |= DRAWING | {"prompt": [case.prompt for case in batch]}
            own |= {"think": task == "relation", "max_think_tokens": MAX_TOKENS}
        latents = pipe(output_type="latent", **own).images
        found.append(latents)
        side = round(latents.shape[1] ** 0.5)
        for image, case in zip(pipe.decode_latents(latents, (side, side)), batch, strict=True):
            right += is_right(image, case.target if task == "edit" else case)
    return torch.cat(found), right / num


def pictures(num: int, steps: int) -> Iterator[dict[str, Any]]:
    """Rows of the table of held branches."""
    pipe = BagelPipeline.from_pretrained(str(SHAPES / "checkpoint"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for task in TASKS:
        plain = None
        for name, settings, held in ways():

            def drawing(grid: Any, guidance: Any, branches: Any, held: Callable[[], HeldBranches] = held) -> Drawing:
                return Drawing(grid, guidance, branches, held())

            with mock.patch.object(denoising, "Drawing", drawing), counted_forwards(pipe) as branches:
                start = time.process_time()
                latents, score = drawn(pipe, task, num, settings | {"num_inference_steps": steps})
                seconds = time.process_time() - start
            plain = latents if plain is None else plain
            errors = (latents - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
            yield {
                "task": task,
                "way": name,
                "forwards": sum(branches) / num,
                "processor_seconds": seconds / num,
                "mean_error": float(errors.mean()),
                "largest_error": float(errors.max()),
                "score": score,
            }


def shared_prompts(repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of the table of prompts that have something in common: calls of a single step."""
    pipe = make_pipeline("middle", torch.float32, torch.device("cpu"))
    instructions = [INSTRUCTION.replace("green", colour) for colour in ("green", "blue", "red", "black")]
    edits: dict[str, Any] = {"prompt": instructions, "image": [[picture(256)]] * len(instructions)}
    plans: dict[str, Any] = {"prompt": prompts_of(8), "think": True, "max_think_tokens": 2, "height": 64, "width": 64}
    calls = {
        "4 instructions for one image, its mean": edits | {"vae_sample_mode": "argmax"},
        "4 instructions for one image, sampled": edits,
        "8 prompts that ask for a plan, of one token": plans,
    }
    for name, settings in calls.items():

        def run(settings: dict[str, Any] = settings) -> None:
            pipe(num_inference_steps=1, guidance_scale=1.0, output_type="latent", **settings)

        def run_apart(run: Callable[[], None] = run) -> None:
            # Nothing is the same object, so nothing is found to be the same.
            with mock.patch.object(pipeline_bagel, "share_segments", list):
                run()

        together, apart = least_processor_seconds((run, run_apart), repeats)
        yield {"call": name, "shared": together, "apart": apart}


def joined_attention(repeats: int) -> Iterator[dict[str, Any]]:
    """
    Rows of the table of attention at the middle width.

    Joining is given its merge for free: the queries of two branches attend to the common prefix in one call, those of each to its
    own tokens in another, and what would put the two parts together is left out.
    """
    for pixels, prefix in ((256, 512), (512, 1536), (1024, 5120)):
        tokens = (pixels // 16) ** 2 + 2
        query, other = torch.randn(2, 1, 8, tokens, 64).unbind()
        past, own = torch.randn(1, 2, prefix, 64), torch.randn(1, 2, tokens, 64)
        whole, queries = torch.cat([past, own], dim=2), torch.cat([query, other], dim=2)

        def attend(queries: Iterable[torch.Tensor], states: torch.Tensor) -> None:
            for query in queries:
                functional.scaled_dot_product_attention(query, states, states, enable_gqa=True)

        def run_joined(
            attend: Any = attend, queries: Any = queries, each: Any = (query, other), past: Any = past
        ) -> None:
            attend([queries], past)
            attend(each, own)

        apart, joined = least_processor_seconds((partial(attend, (query, other), whole), run_joined), repeats)
        yield {"pixels": pixels, "prefix": prefix, "apart": apart, "joined": joined}


def print_row(values: Iterable[Any]) -> None:
    print(f"| {' | '.join(map(str, values))} |", flush=True)


def print_table(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Show rows as they come, and keep them."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        if not kept:
            print_row(row)
            print_row(["---"] * len(row))
        kept.append(row)
        print_row(f"{value:.4g}" if isinstance(value, float) else value for value in row.values())
    print()
    return kept


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=12, help="cases a task of bagel-shapes")
    parser.add_argument("--steps", type=int, default=49, help="of each picture")
    parser.add_argument("--repeats", type=int, default=3, help="of the other two tables")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(arguments)
    need_at_least(1, parser, args, "num", "steps", "repeats")
    need_output(parser, "json", args.json)
    torch.set_num_threads(1)
    tables = {
        "pictures": print_table(pictures(args.num, args.steps)),
        "shared_prompts": print_table(shared_prompts(args.repeats)),
        "joined_attention": print_table(joined_attention(args.repeats)),
    }
    if args.json:
        settings = {"num": args.num, "steps": args.steps, "repeats": args.repeats}
        args.json.write_text(json.dumps(machine(1) | settings | tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
