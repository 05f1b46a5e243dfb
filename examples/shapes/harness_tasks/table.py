# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""
What harnesses found and what our own evaluation found, as `run.py` wrote them into a folder; an error if an item differs:

    python examples/shapes/harness_tasks/table.py runs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


HEAD = (
    *("harness", "task", "items", "its score", "our score", "differ"),
    *("start", "in the pipeline", "beside it", "overhead", "rest"),
)


def rows(folder: Path) -> list[tuple[str, ...]]:
    """A row of each run of a harness."""
    runs = {(file.parts[-3], file.parts[-2]): json.loads(file.read_bytes()) for file in folder.glob("*/*/run.json")}
    return [
        _row(harness, task, run, runs["own", task]["right"])
        for (harness, task), run in sorted(runs.items())
        if harness != "own"
    ]


def _row(harness: str, task: str, run: dict[str, Any], ours: list[bool]) -> tuple[str, ...]:
    theirs = run["right"]
    if len(theirs) != len(ours):
        raise ValueError(f"{harness} answered {len(theirs)} items of {task}, and our evaluation {len(ours)}.")
    differ = sum(their != our for their, our in zip(theirs, ours, strict=True))
    scores = (f"{sum(right) / len(right):.4f}" for right in (theirs, ours))
    start, asking, beside, rest = (f"{run[part]:.2f} s" for part in ("start", "asking", "beside", "rest"))
    overhead = f"{run['beside'] / run['asking']:.1%}"
    return harness, task, str(len(ours)), *scores, str(differ), start, asking, beside, overhead, rest


def main() -> None:
    table = [HEAD, *rows(Path(sys.argv[1]))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(table) == 1 or any(row[HEAD.index("differ")] != "0" for row in table[1:]):
        raise SystemExit("There are no runs, or items whose answers our evaluation judges otherwise.")


if __name__ == "__main__":
    main()
