# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What `bagel bench` costs beside the pipeline's calls: `python benchmarks/bench_overhead.py --steps 25`.

Of each run all that is spent outside of the calls is set against what is spent inside of them: two runs one after the other
differ by more than that. On a CPU the time is the processor's, which other work on the machine leaves as it is.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from refusals import need_at_least
from timing import default_device, synchronize

from bagel_bench import Picture
from bagel_bench.folder import RunFolder
from bagel_bench.running import Run
from diffusers_bagel import BagelPipeline


SHAPES = Path(__file__).parents[1] / "examples" / "shapes" / "checkpoint"


class TimedPipeline(BagelPipeline):
    """Adds up the seconds of its calls."""

    seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = clock(self.device)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            TimedPipeline.seconds += clock(self.device) - start


def clock(device: torch.device) -> float:
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHAPES))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--num", type=int, default=10, help="pictures")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(arguments)
    need_at_least(1, parser, args, "steps", "num", "repeats")
    device = default_device()
    pipe = TimedPipeline.from_pretrained(args.model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    settings = {"preset": "geneval", "num_inference_steps": args.steps}
    pictures = [Picture(f"{n}.png", "a red circle and a blue star on white", (str(n),)) for n in range(args.num)]
    shares = []
    for repeat in range(args.repeats + 1):
        with tempfile.TemporaryDirectory() as out:
            folder = RunFolder(Path(out))
            TimedPipeline.seconds, start = 0.0, clock(device)
            with folder.opened({}):
                Run(pipe, folder, settings, seed=0, skips=False).draw(pictures)
            whole = clock(device) - start
        # The first run warms up.
        if repeat:
            shares.append(whole / TimedPipeline.seconds - 1)
            print(f"calls {TimedPipeline.seconds:.2f} s, run {whole:.2f} s: {shares[-1]:+.1%}")
    print(f"median {statistics.median(shares):+.1%}")


if __name__ == "__main__":
    main()
