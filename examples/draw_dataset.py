# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Draw the lines of a file on a Ray cluster, by Ray Data, into a folder of pictures with a manifest.

    python examples/draw_dataset.py prompts.txt dataset --workers 8
    RAY_ADDRESS=head:6379 python examples/draw_dataset.py prompts.txt /shared/dataset --workers 64

The work is cut into shards of a few lines. A shard is a folder, `shards/00003`, that appears whole or not at all: whoever draws
it writes beside it and renames at the end, which only the first of two can do. So a worker that dies loses its shard alone, which
Ray gives to another one, and the same command goes on where a killed one stopped; a shard whose files are gone or cut off is
done again. Each picture is drawn by itself, from a seed that follows from its prompt: neither the number of workers nor the size
of the shards changes a file. With several machines the folder must be one that all of them see. See docs/ray.md.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffusers_bagel import BagelPipeline


MANIFEST = "manifest.jsonl"
# What is still being written, or was when somebody was killed.
PARTIAL = ".partial-"


@dataclass(frozen=True)
class Task:
    """A picture that is to be drawn: the line of its prompt, counted from 0, and where its noise comes from."""

    index: int
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.index:08}.png"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="a text file, a prompt a line")
    parser.add_argument("folder", type=Path, help="where to write shards/, manifest.jsonl and dataset.json")
    parser.add_argument("--model", default="ByteDance-Seed/BAGEL-7B-MoT")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--steps", type=int, default=49)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0, help="another one gives other pictures of the same prompts")
    parser.add_argument("--shard-size", type=int, default=16, help="pictures that are lost together")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw, each with a GPU if there are any")
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides how a picture looks, but for its prompt."""
    return {name: getattr(args, name) for name in ("model", "dtype", "size", "steps", "guidance_scale", "seed")}


def plan(lines: Sequence[str], seed: int) -> list[Task]:
    """
    A task for each prompt. Its seed follows from the words, and from how often the same words came before.

    Raises:
        ValueError: naming a line without words.
    """
    seen: Counter[str] = Counter()
    tasks = []
    for index, prompt in enumerate(lines):
        if not prompt.strip():
            raise ValueError(f"line {index + 1} of the prompts is empty: every line must be a prompt.")
        digest = hashlib.sha256(f"{seed}\n{seen[prompt]}\n{prompt}".encode()).digest()
        tasks.append(Task(index, prompt, int.from_bytes(digest[:7], "big")))
        seen[prompt] += 1
    return tasks


class Dataset:
    """
    The folder that is filled.

    Args:
        folder (`Path`): It need not be there yet.
        tasks (`list[Task]`): All pictures.
        settings (`dict`): What all of them are drawn by.
        shard_size (`int`): Pictures a shard.

    Raises:
        ValueError: if the folder holds pictures of other prompts or settings, naming what differs.
    """

    def __init__(self, folder: Path, tasks: Sequence[Task], settings: dict[str, Any], shard_size: int):
        if shard_size < 1:
            raise ValueError(f"--shard-size must be at least 1, got {shard_size}.")
        self.folder = folder
        self.shards = [list(tasks[start : start + shard_size]) for start in range(0, len(tasks), shard_size)]
        prompts = hashlib.sha256("\n".join(task.prompt for task in tasks).encode()).hexdigest()
        described = settings | {"shard_size": shard_size, "pictures": len(tasks), "prompts_sha256": prompts}
        file = folder / "dataset.json"
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = [name for name, value in described.items() if before.get(name) != value]
            if changed:
                raise ValueError(f"'{folder}' was begun with other {', '.join(changed)}: name another folder.")
        else:
            (folder / "shards").mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(described, indent=1) + "\n")

    def place(self, number: int) -> Path:
        return self.folder / "shards" / f"{number:05}"

    def clean(self) -> list[int]:
        """
        Take away what is not whole: no job may be running. The shards that are left to do.

        A file counts as whole if it is as long as the manifest says.
        """
        for partial in (self.folder / "shards").glob(f"{PARTIAL}*"):
            shutil.rmtree(partial)
        left = [number for number, tasks in enumerate(self.shards) if not is_whole(self.place(number), tasks)]
        for number in left:
            if self.place(number).exists():
                shutil.rmtree(self.place(number))
        return left

    def merge(self) -> Path:
        """One manifest of all shards, in the order of the prompts."""
        shards = range(len(self.shards))
        rows = (
            row | {"file": f"shards/{number:05}/{row['file']}"}
            for number in shards
            for row in rows_of(self.place(number))
        )
        return write_whole(self.folder / MANIFEST, as_lines(rows))


def as_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows_of(shard: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shard / MANIFEST).read_text(encoding="utf-8").splitlines()]


def write_whole(file: Path, text: str) -> Path:
    partial = file.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(file)


def is_whole(shard: Path, tasks: Sequence[Task]) -> bool:
    """Whether a shard has all of its pictures."""
    if not (shard / MANIFEST).exists():
        return False
    try:
        rows = rows_of(shard)
    except ValueError:
        # Cut off, as by a machine that lost its power.
        return False
    files = [shard / task.file for task in tasks]
    return [row["file"] for row in rows] == [task.file for task in tasks] and all(
        file.exists() and file.stat().st_size == row["bytes"] for file, row in zip(files, rows, strict=True)
    )


def draw_shard(pipe: BagelPipeline, tasks: Sequence[Task], place: Path, settings: dict[str, Any]) -> bool:
    """Draw all pictures of a shard; whether they are those that stay, or another worker was first."""
    partial = place.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    partial.mkdir()
    rows = []
    for task in tasks:
        # Pictures of one batch would differ by the rounding of its shapes.
        image = pipe(
            task.prompt,
            height=settings["size"],
            width=settings["size"],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            generator=torch.Generator().manual_seed(task.seed),
        ).images[0]
        image.save(partial / task.file)
        content = (partial / task.file).read_bytes()
        rows.append(
            asdict(task) | {"file": task.file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        )
    (partial / MANIFEST).write_text(as_lines(rows), encoding="utf-8")
    try:
        partial.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(partial)
        return False
    return True


class Drawer:
    """A worker of Ray Data: loads the model once, and draws shard after shard."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipe = BagelPipeline.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"])).to(
            device
        )
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        tasks = [Task(**task) for task in json.loads(row["tasks"])]
        drawn = draw_shard(self.pipe, tasks, Path(row["place"]), self.settings)
        return {"place": row["place"], "pictures": len(tasks) if drawn else 0, "pid": os.getpid()}


def draw(dataset: Dataset, left: Sequence[int], settings: dict[str, Any], workers: int) -> None:
    """Draw the shards that are left, on the cluster of `RAY_ADDRESS` or on this machine."""
    import ray  # what precedes is of use without it

    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        # Pictures go to the disk, not through the object store.
        ray.init(num_cpus=workers, include_dashboard=False, object_store_memory=200 * 2**20)
    rows = [
        {
            "place": str(dataset.place(number).resolve()),
            "tasks": json.dumps([asdict(task) for task in dataset.shards[number]]),
        }
        for number in left
    ]
    # A block a shard: what a dead worker had begun is given to another one by the block.
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Drawer,  # type: ignore[arg-type]
        fn_constructor_args=(settings,),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows)), max_tasks_in_flight_per_actor=1),
        num_gpus=1 if ray.cluster_resources().get("GPU") else None,
    )
    try:
        for row in done.iter_rows():
            print(f"{Path(row['place']).name}: {row['pictures']} pictures by process {row['pid']}", flush=True)
    finally:
        ray.shutdown()


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    settings = settings_of(args)
    try:
        tasks = plan(args.prompts.read_text(encoding="utf-8").splitlines(), args.seed)
        dataset = Dataset(args.folder, tasks, settings, args.shard_size)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    left = dataset.clean()
    print(f"{len(dataset.shards)} shards, {len(dataset.shards) - len(left)} of them there", flush=True)
    start = time.perf_counter()
    if left:
        draw(dataset, left, settings, args.workers)
        if missing := dataset.clean():
            raise SystemExit(f"error: shards {missing} are not whole: run the command again.")
    print(f"{dataset.merge()}: {len(tasks)} pictures, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
