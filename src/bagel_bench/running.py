# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Draw what is not drawn yet. A picture is a call of its own with seeds of its own, so that its bytes depend on nothing else."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tqdm.auto import tqdm

from diffusers_bagel import BagelPipeline
from transformers_bagel.image_processing_bagel import to_rgb

from .benchmarks import Picture
from .folder import RunFolder, content_hash


PACKAGES = ("transformers-bagel", "transformers", "diffusers", "torch", "pillow")
# Of two pictures in a file, as the scorer of DPG-Bench cuts them.
COLUMNS = 2
JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}


@dataclass(frozen=True)
class Run:
    """
    The drawing of a benchmark.

    Attributes:
        pipe ([`BagelPipeline`])
        folder ([`RunFolder`]): Opened.
        settings (`dict[str, Any]`): Of the pipeline's call, `preset` among them.
        seed (`int`): Of the run; a picture's seed follows from it and from the picture's name.
        skips (`bool`): Whether a picture that cannot be drawn is left out instead of ending the run.
    """

    pipe: BagelPipeline
    folder: RunFolder
    settings: dict[str, Any]
    seed: int
    skips: bool

    def draw(self, pictures: Sequence[Picture], at_once: int = 1) -> None:
        """
        Draw those that are not there yet.

        Args:
            pictures (`Sequence[Picture]`): Of this process.
            at_once (`int`, *optional*, defaults to 1): Threads, each with a picture of its own.

        Raises:
            ValueError: naming the picture that cannot be drawn, if none is to be skipped.
        """
        missing = [picture for picture in pictures if not (self.folder.pictures / picture.file).exists()]
        progress = tqdm(total=len(pictures), initial=len(pictures) - len(missing), unit="picture")
        progress.disable = progress.disable or self.folder.rank != 0
        with progress, _threads(at_once, self.pipe.device) as threads:
            drawings = [threads.submit(self.draw_one, picture) for picture in missing]
            try:
                for drawn in as_completed(drawings):
                    drawn.result()
                    progress.update()
            except BaseException:
                # Those that run are finished, and written.
                threads.shutdown(cancel_futures=True)
                raise

    def draw_one(self, picture: Picture) -> None:
        """Draw and write one picture, and what belongs to it."""
        started = time.perf_counter()
        try:
            images = [_opened(file) for file in picture.images]
            began = time.perf_counter()
            drawings, plans = zip(*(self._call(picture.prompt, images, name) for name in picture.names), strict=True)
            drew = time.perf_counter() - began
        except (ValueError, TypeError) as error:
            if not self.skips:
                raise ValueError(f"'{picture.file}' cannot be drawn: {error}") from error
            self.folder.record(file=picture.file, prompt=picture.prompt, skipped=str(error))
            return
        drawing = _grid(drawings)
        for file, text in picture.texts.items():
            self.folder.write(file, partial(Path.write_text, data=text, encoding="utf-8"))
        for file, source in picture.copies.items():
            copied = _opened(Path(source)) if source else drawing
            self.folder.write(file, partial(copied.save, **(JPEG if file.endswith(".jpg") else {})))
        # Last, as it says that all is done.
        self.folder.write(picture.file, drawing.save)
        seeds = [picture_seed(self.seed, name) for name in picture.names]
        seconds = {"pipeline_seconds": round(drew, 4), "seconds": round(time.perf_counter() - started, 4)}
        said: dict[str, Any] = {"plans": plans} if any(plans) else {}
        said |= {"sources": [content_hash(file) for file in picture.images]} if picture.images else {}
        self.folder.record(file=picture.file, prompt=picture.prompt, seeds=seeds, **said, **seconds)

    def _call(self, prompt: str, images: list[PIL.Image.Image], name: str) -> tuple[PIL.Image.Image, str | None]:
        generator = torch.Generator().manual_seed(picture_seed(self.seed, name))
        out = self.pipe(prompt, image=images or None, generator=generator, **self.settings)
        return out.images[0], out.texts[0] if out.texts else None


@contextmanager
def _threads(count: int, device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Threads that draw. On a CPU each computes alone, as sums of several cores would follow from how many there are."""
    cores = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            count, initializer=partial(torch.set_num_threads, 1 if device.type == "cpu" else cores)
        ) as threads:
            yield threads
    finally:
        torch.set_num_threads(cores)


def picture_seed(seed: int, name: str) -> int:
    """The seed of a picture, from that of the run and the picture's name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) >> 1


def _opened(file: Path) -> PIL.Image.Image:
    """
    A picture as the model sees it: RGB, upright.

    Raises:
        ValueError: naming the file.
    """
    try:
        with PIL.Image.open(file) as image:
            return to_rgb(image)
    except (OSError, ValueError) as error:
        raise ValueError(f"the picture '{file}' cannot be read ({error})") from error


def _grid(drawings: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """Drawings row by row in one picture; one alone as it is."""
    if len(drawings) == 1:
        return drawings[0]
    width, height = drawings[0].size
    grid = PIL.Image.new("RGB", (COLUMNS * width, -(-len(drawings) // COLUMNS) * height))
    for index, drawing in enumerate(drawings):
        grid.paste(drawing, (index % COLUMNS * width, index // COLUMNS * height))
    return grid


def versions() -> dict[str, str]:
    """Of what changes pixels."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def checkpoint_hash(folder: Path) -> str:
    """
    What tells two checkpoints apart without reading all of their weights: names, sizes, and three places of each file.

    A training that goes on changes every one of the weights, so that a few of them are enough.
    """
    digest = hashlib.sha256()
    for file in sorted(
        path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".gguf", ".bin")
    ):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}".encode())
        with file.open("rb") as stream:
            for place in (0, size // 2, max(size - 2**16, 0)):
                stream.seek(place)
                digest.update(stream.read(2**16))
    return digest.hexdigest()[:16]


def summary(
    folder: RunFolder, settings: dict[str, Any], pictures: Sequence[Picture], broken: dict[str, str]
) -> dict | None:
    """
    The report of a run whose pictures are all there, or `None`.

    Args:
        folder ([`RunFolder`])
        settings (`dict[str, Any]`): Of the run.
        pictures (`Sequence[Picture]`): Of all processes.
        broken (`dict[str, str]`): Rows that were left out.
    """
    records = folder.records()
    missing = {picture.file for picture in pictures if not (folder.pictures / picture.file).exists()}
    failed = {record["file"]: record["skipped"] for record in records if "skipped" in record}
    if missing - failed.keys():
        return None
    times = {record["file"]: record for record in records if "seconds" in record}
    pipeline, whole = (sum(record[name] for record in times.values()) for name in ("pipeline_seconds", "seconds"))
    return settings | {
        "pictures": len(pictures) - len(missing),
        "skipped": broken | {file: failed[file] for file in sorted(missing)},
        "time": {
            "seconds": round(whole, 2),
            "pipeline_seconds": round(pipeline, 2),
            "seconds_a_picture": round(whole / max(len(times), 1), 3),
        },
    }
