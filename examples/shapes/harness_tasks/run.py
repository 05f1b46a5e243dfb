# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""
Evaluations of bagel-shapes, item by item, by a harness' own command or by our own evaluation:

    python examples/shapes/harness_tasks/run.py lmms_eval --tasks draw edit --items 10 --folder runs
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision_names  # noqa: F401  before all that imports torchvision
from shapes_tasks import BATCH_SIZE, SHAPES, TASKS, write_items

from bagel_harnesses import answers
from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelForConditionalGeneration, BagelProcessor


FOLDER = Path(__file__).parent
CHECKPOINT = SHAPES / "checkpoint"
# What asks the model, and what loads it.
ASKS = [
    *((BagelPipeline, "__call__"), (BagelForConditionalGeneration, "generate"), (answers, "send_all")),
    *((BagelProcessor, "__call__"), (BagelProcessor, "apply_chat_template")),
]
LOADS = [(owner, "from_pretrained") for owner in (BagelPipeline, BagelForConditionalGeneration, BagelProcessor)]


class Stopwatch:
    """The seconds inside some functions, whichever of them calls which, and when the first began and the last ended."""

    def __init__(self, places: Sequence[tuple[Any, str]]):
        self.seconds, self._depth = 0.0, 0
        self.first, self.last = float("inf"), 0.0
        self._stack, self._places = contextlib.ExitStack(), places

    def __enter__(self) -> Stopwatch:
        for owner, name in self._places:
            self._stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name))))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _timed(self, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start, self._depth = time.perf_counter(), self._depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.first, self.last = min(self.first, start), time.perf_counter()
                    self.seconds += self.last - start

        return timed


@dataclass(frozen=True)
class Run:
    """
    What a run found, and what it took.

    Attributes:
        right (`list[bool]`): Of each item, whether its answer is right.
        start (`float`): Seconds until the harness loaded the model.
        asking (`float`): Seconds in the pipeline.
        beside (`float`): The others between the first question and the last answer.
        rest (`float`): Between the loaded model and the first question, and after the last answer.
    """

    right: list[bool]
    start: float
    asking: float
    beside: float
    rest: float


def own(task: str, count: int) -> Run:
    """Our own evaluation."""
    # In this process nobody wants the package of that name.
    sys.path.insert(0, str(SHAPES))
    import evaluate

    pipe = BagelPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    evaluation, cases = evaluate.Evaluation(pipe, count), TASKS[task].cases(count)
    with Stopwatch([*ASKS, (evaluate, "send_all")]) as asks:
        right = TASKS[task].own(evaluation, cases)
    return Run(right, 0.0, asks.seconds, asks.last - asks.first - asks.seconds, 0.0)


def lmms_eval(task: str, count: int) -> Run:
    """`lmms-eval --model bagel_hf`."""
    settings = {"pretrained": CHECKPOINT, "dtype": "float32"} | TASKS[task].settings
    model_args = ",".join(f"{name}={value}" for name, value in settings.items())
    took = _command("lmms_eval.cli.dispatch:main", "--model", "bagel_hf", *_task(f"shapes_{task}", model_args))
    return Run(_logged("*_samples_*.jsonl"), *took)


def lm_eval(task: str, count: int) -> Run:
    """`python -m bagel_harnesses.lm_eval run --model hf-multimodal`, which writes, and does not think before."""
    model = ("--model", "hf-multimodal", "--device", "cpu", "--apply_chat_template")
    arguments = _task(f"lm_eval_shapes_{task}", f"pretrained={CHECKPOINT},dtype=float32")
    took = _command("bagel_harnesses.lm_eval:main", "run", *model, *arguments)
    return Run(_logged("samples_*.jsonl"), *took)


def _task(name: str, model_args: str) -> tuple[Any, ...]:
    """What both of these are told by the same words."""
    which = ("--tasks", name, "--include_path", FOLDER / "tasks", "--output_path", "logs", "--log_samples")
    return "--model_args", model_args, "--batch_size", BATCH_SIZE, *which


def vlmevalkit(task: str, count: int) -> Run:
    """`python -m bagel_harnesses.vlmevalkit --config`."""
    import vlmeval.dataset
    from vlmeval.smp import load
    from vlmevalkit_shapes import ShapesDataset, judged

    vlmeval.dataset.ShapesDataset = ShapesDataset
    model = {"class": "BagelHF", "model_path": str(CHECKPOINT), "dtype": "float32"} | TASKS[task].settings
    config = {"model": {"bagel_hf": model}, "data": {task: {"class": "ShapesDataset", "dataset": task}}}
    Path("config.json").write_text(json.dumps(config), encoding="utf-8")
    took = _command("bagel_harnesses.vlmevalkit:main", "--config", "config.json", "--work-dir", "logs")
    (predictions,) = Path("logs", "bagel_hf").glob(f"bagel_hf_{task}.*")
    return Run(judged(load(str(predictions))), *took)


HARNESSES = {"own": own, "lmms_eval": lmms_eval, "vlmevalkit": vlmevalkit, "lm_eval": lm_eval}


def _command(entry: str, *arguments: Any) -> tuple[float, float, float, float]:
    """Run a harness' command in this process, and measure it as `Run` says. What it prints goes to a file."""
    module, _, function = entry.partition(":")
    command = getattr(importlib.import_module(module), function)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [module, *map(str, arguments)]))
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open("output.txt", "w", encoding="utf-8"))))
        loads, asks = stack.enter_context(Stopwatch(LOADS)), stack.enter_context(Stopwatch(ASKS))
        start = time.perf_counter()
        command()
        end = time.perf_counter()
    beside = asks.last - asks.first - asks.seconds
    return loads.first - start, asks.seconds, beside, asks.first - loads.last + end - asks.last


def _logged(pattern: str) -> list[bool]:
    """The scores that a harness logged, in the order of the items."""
    (file,) = Path("logs").rglob(pattern)
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [sample["right"] == 1 for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("harness", choices=HARNESSES)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--items", type=int, default=200, help="of each task")
    parser.add_argument("--folder", type=Path, required=True, help="for all that the runs write, in HARNESS/TASK")
    args = parser.parse_args()
    for task in args.tasks:
        folder = args.folder.absolute() / args.harness / task
        folder.mkdir(parents=True)
        os.chdir(folder)
        write_items(folder, task, args.items)
        run = HARNESSES[args.harness](task, args.items)
        Path("run.json").write_text(json.dumps(asdict(run)), encoding="utf-8")


if __name__ == "__main__":
    main()
