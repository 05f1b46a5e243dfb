# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What an engine makes of several users: `python benchmarks/engine.py --json engine.json`.

Tokens in a second of many users beside those of one, and pictures in a second of an engine beside a batch of the pipeline. What
is compared takes turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import torch
from machine import machine
from refusals import need_at_least, need_output

from bagel_server import Engine
from diffusers_bagel import BagelPipeline, BagelSession


Clock: TypeAlias = Callable[[], float]
SHAPES = Path(__file__).parents[1] / "examples" / "shapes" / "checkpoint"
PROMPTS = [
    f"a {size} red {shape} on white"
    for size in ("large", "small")
    for shape in ("circle", "square", "star", "triangle", "heart", "diamond")
]


def forbid(token: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A text does not end, so that all are of one length."""

    def apply(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, token] = -torch.inf
        return scores

    return apply


def texts(clock: Clock, engine: Engine, clients: int, each: int, tokens: int) -> float:
    """Tokens in a second of clients, each of which asks again when it has its answer."""
    end = engine.pipe.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings: dict[str, Any] = {"output": "text", "max_new_tokens": tokens, "logits_processor": [forbid(end)]}

    def ask(_: int) -> None:
        for _ in range(each):
            engine.submit(BagelSession(engine.pipe), "what is it?", **settings).result()

    before, start = engine.stats().tokens, clock()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, range(clients)))
    return (engine.stats().tokens - before) / (clock() - start)


def drawings(clock: Clock, engine: Engine, count: int, steps: int) -> float:
    """Pictures in a second that are asked for at a time."""
    start = clock()
    # The VAE's mode, as a server takes it.
    answers = [
        engine.submit(BagelSession(engine.pipe), prompt, "image", num_inference_steps=steps, vae_sample_mode="argmax")
        for prompt in PROMPTS[:count]
    ]
    for answer in answers:
        answer.result()
    return count / (clock() - start)


def batch(clock: Clock, pipe: BagelPipeline, count: int, steps: int) -> float:
    """The same of one call of the pipeline."""
    start = clock()
    pipe(PROMPTS[:count], num_inference_steps=steps)
    return count / (clock() - start)


def compared(
    what: str, unit: str, floor: Callable[[], float], run: Callable[[], float], repeats: int
) -> dict[str, Any]:
    floor(), run()
    pairs = [(floor(), run()) for _ in range(repeats)]
    floors, found = zip(*pairs, strict=True)
    return {
        "what": what,
        "unit": unit,
        "floor": statistics.median(floors),
        "this": statistics.median(found),
        "ratio": statistics.median(own / base for base, own in pairs),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHAPES, help="folder or repository; by default that of examples/shapes")
    parser.add_argument("--clients", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--drawings", type=int, nargs="*", default=[4, 8], help=f"at most {len(PROMPTS)}")
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--steps", type=int, default=25, help="of each picture")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the CPU; by default all cores")
    parser.add_argument("--processor-time", action="store_true", help="where others work on the machine, too")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(arguments)
    need_at_least(1, parser, args, "clients", "drawings", "tokens", "steps", "repeats", "threads")
    need_output(parser, "json", args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = BagelPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    clock = time.process_time if args.processor_time else time.perf_counter
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(
            f"| {row['what']} | {row['floor']:.1f} {row['unit']} | {row['this']:.1f} | {row['ratio']:.2f} |",
            flush=True,
        )

    print("| what | beside it | this | ratio |\n|---|---|---|---|")
    with Engine(pipe) as engine:
        one = lambda: texts(clock, engine, 1, 4, args.tokens)  # noqa: E731
        for clients in args.clients:
            many = lambda clients=clients: texts(clock, engine, clients, 2, args.tokens)  # noqa: E731
            add(compared(f"{clients} clients beside one", "tokens/s", one, many, args.repeats))
        for count in args.drawings:
            whole = lambda count=count: batch(clock, pipe, count, args.steps)  # noqa: E731
            apart = lambda count=count: drawings(clock, engine, count, args.steps)  # noqa: E731
            what = f"{count} drawings beside a batch of the pipeline"
            add(compared(what, "pictures/s", whole, apart, args.repeats))
    if args.json:
        args.json.write_text(json.dumps(machine(args.threads) | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
