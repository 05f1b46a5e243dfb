# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Where a case of benchmarks/run.py spends what it takes above its floor: `python benchmarks/operators.py "edit, 256 px: full"`.

Each operator counts with the least of its seconds of the processor over the repeats, so that other work on the machine is left out. What is left
of the whole is Python, and torch's way from it to the operators.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import cases
from models import WIDTHS, make_pipeline
from refusals import need_at_least
from timing import least_processor_seconds
from torch.utils._python_dispatch import TorchDispatchMode


KINDS = {
    "products": ("mm", "addmm", "bmm", "convolution"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "copies": ("cat", "index_select", "index", "clone", "copy_", "_to_copy", "masked_scatter", "stack"),
    "masks": ("where", "le", "eq", "bitwise_and", "bitwise_or", "masked_fill", "gather", "scatter_"),
}
REST = "norms, activations, sums, rope, views"


class Timer(TorchDispatchMode):
    """Notes each operator and its nanoseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time_ns()
        result = func(*args, **(kwargs or {}))
        self.found.append((func.overloadpacket.__name__, time.process_time_ns() - start))
        return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="part of the name of the case")
    parser.add_argument("--width", choices=tuple(WIDTHS), default="middle")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    need_at_least(1, parser, args, "repeats", "threads")
    torch.set_num_threads(args.threads)
    case = next((case for case in cases() if args.name in case.name), None)
    if case is None:
        parser.error(f"{args.name!r} is in no name of a case.")
    work = case.make(make_pipeline(args.width, torch.float32, torch.device("cpu")))
    runs = (work.run, work.floor)
    totals = least_processor_seconds(runs, args.repeats)
    kinds = [least_of_kinds(run, args.repeats) for run in runs]
    print(f"{case.group}: {case.name}, {args.width}, {args.threads} thread{'s' * (args.threads > 1)}")
    print("| | run | floor | above, of the floor |")
    print("|---|---|---|---|")
    for kind in (*KINDS, REST):
        print(row(kind, [of_kind[kind] for of_kind in kinds], totals[1]))
    print(
        row("Python", [total - sum(of_kind.values()) for total, of_kind in zip(totals, kinds, strict=True)], totals[1])
    )
    print(row("all", totals, totals[1]))


def least_of_kinds(run: Callable[[], object], repeats: int) -> Counter[str]:
    """Seconds of each kind of operators."""
    noted = []
    for _ in range(repeats):
        with Timer() as timer:
            run()
        noted.append(timer.found)
    seconds: Counter[str] = Counter()
    for same in zip(*noted, strict=True):
        name = same[0][0]
        kind = next((kind for kind, names in KINDS.items() if name in names), REST)
        seconds[kind] += min(nanoseconds for _, nanoseconds in same) / 1e9
    return seconds


def row(name: str, seconds: Sequence[float], floor: float) -> str:
    own, others = seconds
    return f"| {name} | {1000 * own:.1f} ms | {1000 * others:.1f} ms | {(own - others) / floor:+.1%} |"


if __name__ == "__main__":
    main()
