# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Compare this tree with another one: `python benchmarks/compare.py ../other --json compare.json`.

Each tree has a process of its own, with its own benchmarks over its own code, and the two take turns at every call, so that a
machine that grows slower does so for both. The ratio is the median of those of the pairs: below 1, this tree is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine
from refusals import need_output
from run import DTYPES, GROUPS, cases


HERE = Path(__file__).resolve().parents[1]

# Runs inside either tree. A line `[group, name, width, dtype]` makes a case, an empty one times one call of it.
WORKER = """
import json, sys, time
answers, sys.stdout = sys.stdout, sys.stderr
from cases import cases
from models import make_pipeline
from run import DTYPES
from timing import default_device, synchronize

device, found, run = default_device(), {(case.group, case.name): case for case in cases()}, None
for line in sys.stdin:
    if line.strip():
        group, name, width, dtype = json.loads(line)
        run = found[group, name].make(make_pipeline(width, DTYPES[dtype], device)).run
    start = time.perf_counter()
    run()
    synchronize(device)
    print(time.perf_counter() - start, file=answers, flush=True)
"""


class Tree:
    """A process that runs the benchmarks of a source tree."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = os.environ | {"PYTHONPATH": str(folder / "src")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=folder / "benchmarks",
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def seconds(self, case: tuple[str, ...] | None = None) -> float:
        """Of one call: of a new case, or of the last one again."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{json.dumps(case) if case else ''}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The process of '{self.folder}' ended; its error is above.")
        return float(answer)

    def close(self) -> None:
        self.process.communicate()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="root of the other source tree, such as a `git worktree`")
    parser.add_argument("--width", default="middle")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--skip", nargs="*", default=[], help="parts of the names of cases to leave out")
    parser.add_argument("--seconds", type=float, default=30, help="for each case, behind its first call")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(arguments)
    need_output(parser, "json", args.json)
    if not (args.other / "benchmarks" / "cases.py").is_file():
        parser.error(f"{args.other} holds no benchmarks/cases.py.")
    rows = []
    print("| what | pairs | other | this | ratio | middle half of the ratios |")
    print("|---|---|---|---|---|---|")
    for case in cases():
        if case.group in args.groups and not any(part in case.name for part in args.skip):
            rows.append(compare(args.other, (case.group, case.name, args.width, args.dtype), args.seconds))
            print(table_row(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(machine(None) | {"rows": rows}, indent=2) + "\n")


def compare(other: Path, case: tuple[str, ...], budget: float) -> dict[str, Any]:
    """At least five pairs, and more while the budget of seconds lasts. Who comes first changes from pair to pair."""
    trees = [Tree(other), Tree(HERE)]
    try:
        for tree in trees:
            tree.seconds(case)
        pairs: list[tuple[float, float]] = []
        start = time.perf_counter()
        while len(pairs) < 5 or time.perf_counter() - start < budget:
            order = trees if len(pairs) % 2 else trees[::-1]
            found = {tree: tree.seconds() for tree in order}
            pairs.append((found[trees[0]], found[trees[1]]))
    finally:
        for tree in trees:
            tree.close()
    ratios = [own / others for others, own in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "group": case[0],
        "name": case[1],
        "pairs": len(pairs),
        "other_seconds": statistics.median(others for others, _ in pairs),
        "seconds": statistics.median(own for _, own in pairs),
        "ratio": middle,
        "ratio_quartiles": [low, high],
    }


def table_row(row: dict[str, Any]) -> str:
    times = [f"{1000 * row[key]:.1f} ms" for key in ("other_seconds", "seconds")]
    low, high = row["ratio_quartiles"]
    return f"| {row['group']}: {row['name']} | {row['pairs']} | {' | '.join(times)} | {row['ratio']:.3f} | {low:.3f} to {high:.3f} |"


if __name__ == "__main__":
    main()
