# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Measure everything beside its floor: `python benchmarks/run.py --widths middle --json middle.json`.

The floor of a case is its matrix products, convolutions and attentions, at the same shapes and with the same weights, in the
same process; the two take turns. Each case has a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from cases import Case, cases
from machine import machine
from models import WIDTHS, make_pipeline
from refusals import need_at_least, need_output
from timing import default_device, median_and_spread, peak_bytes, seconds_of


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GROUPS = tuple(dict.fromkeys(case.group for case in cases()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", choices=tuple(WIDTHS), default=["middle"])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the CPU; by default all cores")
    parser.add_argument(
        "--onednn",
        action="store_true",
        help="products of float32 by oneDNN in all forwards, not only where it is faster",
    )
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(arguments)
    need_at_least(1, parser, args, "repeats", "threads")
    need_output(parser, "json", args.json)
    chosen = [case for case in cases() if case.group in args.groups and args.only in case.name]
    if not chosen:
        parser.error(f"--only {args.only!r} is in no name of the groups {', '.join(args.groups)}.")
    print("| width | dtype | what | time | spread | rate | floor | ratio | peak |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    settings = {"onednn": args.onednn, "compile": args.compile}
    for width in args.widths:
        for dtype in args.dtypes:
            for case in chosen:
                rows.append(in_process_of_its_own(case, width, dtype, args))
                print(table_row(rows[-1]), flush=True)
                if args.json:
                    args.json.write_text(
                        json.dumps(machine(args.threads) | settings | {"rows": rows}, indent=2) + "\n"
                    )


def in_process_of_its_own(case: Case, width: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_row, args=(sender, case, width, dtype, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(
            f"{case.group}, {case.name}: its process ended with exit code {process.exitcode}; its error is above."
        ) from error
    finally:
        process.join()


def send_row(sender: Any, case: Case, width: str, dtype: str, args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.onednn:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    sender.send(measure(case, width, dtype, args.repeats, args.compile))


def measure(case: Case, width: str, dtype: str, repeats: int, compiles: bool = False) -> dict[str, Any]:
    """A row of the table: seconds are those of one unit."""
    device = default_device()
    pipe = make_pipeline(width, DTYPES[dtype], device)
    work = case.make(pipe)
    if compiles:
        # Behind the recording, which needs the modules to be called.
        pipe.transformer.compile_repeated_blocks()
    peak = peak_bytes(device)
    times, floors = seconds_of((work.run, work.floor), repeats, device)
    (seconds, spread), (floor, _) = median_and_spread(times), median_and_spread(floors)
    return {
        "width": width,
        "dtype": dtype,
        "group": case.group,
        "name": case.name,
        "unit": work.unit,
        "seconds": seconds / work.count,
        "spread": spread / work.count,
        "rate": work.count / seconds,
        "floor_seconds": floor / work.count,
        "ratio": seconds / floor,
        "peak_bytes": peak,
    }


def table_row(row: dict[str, Any]) -> str:
    milliseconds = [f"{1000 * row[key]:.2f} ms" for key in ("seconds", "spread", "floor_seconds")]
    columns = [row["width"], row["dtype"], f"{row['group']}: {row['name']}", milliseconds[0], milliseconds[1]]
    columns += [f"{row['rate']:.4g} {row['unit']}s/s", milliseconds[2], f"{row['ratio']:.3f}"]
    columns.append(f"{row['peak_bytes'] / 2**20:.0f} MiB")
    return f"| {' | '.join(columns)} |"


if __name__ == "__main__":
    main()
