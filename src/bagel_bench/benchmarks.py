# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Which fields of a benchmark's prompts are read, and which files its scorer opens (docs/evaluation.md has the sources)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .rows import BrokenRow, Row, read_rows


@dataclass(frozen=True)
class Picture:
    """
    A picture file of a run.

    Attributes:
        file (`str`): Below the folder of pictures.
        prompt (`str`)
        names (`tuple[str, ...]`): Of each drawing, whose seed follows from it; several become one picture, in two columns.
        images (`tuple[Path, ...]`): What is edited.
        texts, copies (`dict[str, str]`): Files that the scorer reads beside it: their texts; or of which picture file
            each is a copy, `""` being this one.
    """

    file: str
    prompt: str
    names: tuple[str, ...]
    images: tuple[Path, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """
    How a benchmark is run, with the preset of its name.

    Attributes:
        samples (`int`): Drawings of each prompt, if not told otherwise.
        pictures (`Callable`): Of a row, the folder of its pictures, and a number of drawings, what is to be drawn.
    """

    samples: int
    pictures: Callable[[Row, Path, int], list[Picture]]


def _geneval(row: Row, folder: Path, samples: int) -> list[Picture]:
    place = f"{row.number:05}"
    prompt, metadata = row.text("prompt"), json.dumps(row.fields, ensure_ascii=False)
    return [
        Picture(
            f"{place}/samples/{sample:05}.png",
            prompt,
            (f"{place} {sample}",),
            texts={f"{place}/metadata.jsonl": metadata},
        )
        for sample in range(samples)
    ]


def _wise(row: Row, folder: Path, samples: int) -> list[Picture]:
    return [_single(row.name("prompt_id"), row.text("Prompt"), samples)]


def _dpg(row: Row, folder: Path, samples: int) -> list[Picture]:
    return [_single(row.name("item_id"), row.text("text"), samples)]


def _gedit(row: Row, folder: Path, samples: int) -> list[Picture]:
    place = "/".join(("fullset", row.name("task_type"), row.name("instruction_language"), row.name("key")))
    images = row.images("input_image", folder)
    return [_single(place, row.text("instruction"), samples, images, {f"{place}_SRCIMG.png": str(images[0])})]


def _imgedit(row: Row, folder: Path, samples: int) -> list[Picture]:
    return [_single(row.name("key"), row.text("prompt"), samples, row.images("id", folder))]


def _kris(row: Row, folder: Path, samples: int) -> list[Picture]:
    kind = row.name("type")
    place = f"{kind}/{row.name('id')}"
    # The benchmark's own scorer opens the JPEG, the one in BAGEL's repository the PNG.
    return [_single(place, row.text("ins_en"), samples, row.images("ori_img", folder / kind), {f"{place}.jpg": ""})]


def _rise(row: Row, folder: Path, samples: int) -> list[Picture]:
    place = f"{row.name('category')}/{row.name('index')}"
    return [_single(place, row.text("instruction"), samples, row.images("image", folder))]


def _single(
    place: str, prompt: str, samples: int, images: tuple[Path, ...] = (), copies: dict[str, str] | None = None
) -> Picture:
    names = tuple(f"{place} {sample}" for sample in range(samples))
    return Picture(f"{place}.png", prompt, names, images, copies=copies or {})


BENCHMARKS = {
    "geneval": Benchmark(4, _geneval),
    "wise": Benchmark(1, _wise),
    "dpg": Benchmark(4, _dpg),
    "gedit": Benchmark(1, _gedit),
    "imgedit": Benchmark(1, _imgedit),
    "kris": Benchmark(1, _kris),
    "rise": Benchmark(1, _rise),
}


def read_pictures(
    benchmark: str, prompts: Path, images: Path | None = None, samples: int | None = None
) -> tuple[list[Picture], dict[str, str]]:
    """
    What a benchmark asks for.

    Args:
        benchmark (`str`): Of `BENCHMARKS`.
        prompts (`Path`): See [`~rows.read_rows`].
        images (`Path`, *optional*): Folder of the pictures that are edited, by default the one of the prompts.
        samples (`int`, *optional*): Drawings of each prompt.

    Returns:
        The pictures, and what is wrong with the rows that cannot be drawn, by where they stand.

    Raises:
        ValueError: if the benchmark is unknown, or the prompts are no file of prompts.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"`benchmark` must be one of {', '.join(BENCHMARKS)}, got {benchmark!r}.")
    known = BENCHMARKS[benchmark]
    folder = images or (prompts if prompts.is_dir() else prompts.parent)
    found: dict[str, Picture] = {}
    places: dict[str, str] = {}
    broken: dict[str, str] = {}
    for row in read_rows(prompts):
        try:
            for picture in known.pictures(row, folder, samples or known.samples):
                if picture.file in places:
                    raise BrokenRow(f"it has the id of {places[picture.file]}.")
                places[picture.file], found[picture.file] = row.where, picture
        except BrokenRow as error:
            broken[row.where] = str(error)
    return list(found.values()), broken
