# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Rows of a dataset as training samples: drawing, editing, understanding, or conversations as they are."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import Dataset, Image, List, Value, load_dataset
from datasets.exceptions import DatasetsError


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# A model whose tables of positions end before gets smaller pictures.
LARGEST = 1024
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# The arguments that name data, and those that name columns.
SOURCES = ("dataset_name", "train_data_file", "instance_data_dir", "prompt_file")
COLUMNS = (
    "image_column",
    "caption_column",
    "cond_image_column",
    "question_column",
    "answer_column",
    "messages_column",
)
# Files of rows, by the builders of `datasets`.
TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class TrainingSamples:
    """
    Samples for [`BagelDataCollator`], one a row.

    Args:
        rows (`datasets.Dataset`): The rows; images undecoded, so that a broken one is the collator's to report.
        args (`argparse.Namespace`): Names of the columns, see `arguments.py`.
        root (`Path`, *optional*): Where relative paths of images start.

    Raises:
        ValueError: if the columns that the task needs are not there.
    """

    def __init__(self, rows: Dataset, args: argparse.Namespace, root: Path | None = None):
        self.rows = rows
        self.args = args
        self.root = root
        columns = rows.column_names
        self.task = self._task(columns)
        self.needed = self._needed()
        missing = [name for name in self.needed if name not in columns]
        if missing:
            raise ValueError(
                f"The task is {self.task}, but the data has no column {', '.join(map(repr, missing))}. It has "
                f"{', '.join(map(repr, columns))}. Name the columns with "
                f"{', '.join(f'--{name}' for name in COLUMNS if name in args)}."
            )

    def _task(self, columns: list[str]) -> str:
        args = self.args
        if args.messages_column in columns:
            for name in ("question_column", "cond_image_column", "instance_prompt"):
                if getattr(args, name, None):
                    raise ValueError(
                        f"--{name} has no effect on conversations, which the data has in its column "
                        f"{args.messages_column!r}. Leave it out, or those, with another --messages_column."
                    )
            return "messages"
        if getattr(args, "question_column", None):
            return "understanding"
        return "editing" if args.cond_image_column else "text-to-image"

    def _needed(self) -> list[str]:
        """Columns that every row must fill."""
        args = self.args
        if self.task == "messages":
            return [args.messages_column]
        if self.task == "understanding":
            return [args.question_column, args.answer_column]
        if self.task == "editing":
            return [args.cond_image_column, args.caption_column, args.image_column]
        return [args.image_column] + ([] if args.instance_prompt else [args.caption_column])

    def __len__(self) -> int:
        return len(self.rows) * self.args.repeats

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, args = self.rows[index % len(self.rows)], self.args
        if self.task == "messages":
            images = row.get("images")
            sample = {"messages": self._with_paths(row[args.messages_column])}
            if images is not None:
                sample["images"] = [self._image(image) for image in images]
            return sample | self._name(row, images[0] if images else None)
        has_prompt = bool(args.instance_prompt)
        empty = [
            name for name in self.needed if row[name] is None and not (has_prompt and name == args.caption_column)
        ]
        if empty:
            name = "".join(f" {name!r}" for name in self._name(row, None).values())
            raise ValueError(f"The row{name} has nothing in the column {', '.join(map(repr, empty))}.")
        image = row.get(args.image_column)
        if self.task == "understanding":
            question = [{"type": "text", "text": row[args.question_column]}]
            if image is not None:
                question.insert(0, {"type": "image", "image": self._image(image)})
            turns = (question, [{"type": "text", "text": row[args.answer_column]}])
        else:
            prompt = [{"type": "text", "text": row.get(args.caption_column) or args.instance_prompt}]
            if self.task == "editing":
                prompt.insert(0, {"type": "image", "image": self._image(row[args.cond_image_column])})
            turns = (prompt, [{"type": "image", "image": self._image(image)}])
        messages = [{"role": role, "content": part} for role, part in zip(("user", "assistant"), turns, strict=True)]
        return {"messages": messages} | self._name(row, image)

    def _image(self, image: Any) -> Any:
        if isinstance(image, dict) and image.get("bytes") is None:
            image = image["path"]
        is_relative = isinstance(image, str) and "://" not in image and not os.path.isabs(image)
        return str(self.root / image) if is_relative and self.root is not None else image

    def _with_paths(self, messages: Any) -> Any:
        """Messages with whole paths. What is no message stays as it is, for the collator to name."""
        if isinstance(messages, list):
            return [self._with_paths(item) for item in messages]
        if isinstance(messages, dict):
            return {
                key: self._image(value) if key in ("image", "path") else self._with_paths(value)
                for key, value in messages.items()
            }
        return messages

    def _name(self, row: dict[str, Any], image: Any) -> dict[str, Any]:
        """The row's own name, or its image's path, for messages about it."""
        name = row.get("id", row.get("file_name"))
        if name is None and isinstance(image, dict):
            name = image.get("path")
        return {} if name is None else {"id": name}


class PromptSamples:
    """
    Samples of prompts alone, those of `--prompt_file`: the picture that each ends in is empty, and gives the size.

    Args:
        args (`argparse.Namespace`): See `arguments.py`.

    Raises:
        ValueError, OSError: if there is no such file, or if it holds no prompts.
    """

    task = "text-to-image"

    def __init__(self, args: argparse.Namespace):
        self.args = args
        file = args.prompt_file
        if Path(file).is_dir():
            raise IsADirectoryError(f"--prompt_file must be a file, but '{file}' is a folder.")
        if not Path(file).exists():
            raise FileNotFoundError(f"--prompt_file: there is no file '{file}'.")
        prompts = _column_of_texts(file, args.caption_column) if is_table(file) else _lines(file)
        if not any(prompts):
            raise ValueError(f"--prompt_file: '{file}' holds no prompt.")
        self.prompts = prompts[: args.max_train_samples]
        side = args.resolution or LARGEST
        self.picture = PIL.Image.new("RGB", (side, side))

    def __len__(self) -> int:
        return len(self.prompts) * self.args.repeats

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt = self.prompts[index % len(self.prompts)]
        if not prompt:
            raise ValueError(f"The row has nothing in the column {self.args.caption_column!r}.")
        turns = (
            ("user", [{"type": "text", "text": prompt}]),
            ("assistant", [{"type": "image", "image": self.picture}]),
        )
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


def is_table(file: str) -> bool:
    """Whether a file has rows and columns, by its name."""
    return Path(file).suffix.lower() in TABLES


def _lines(file: str) -> list[str]:
    """The lines of a text that hold anything."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds null characters")
    except ValueError as error:
        raise ValueError(
            f"--prompt_file: '{file}' is no UTF-8 text ({error}). Pass one with a prompt on each line, or a "
            f"table ({', '.join(TABLES)})."
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _column_of_texts(file: str, column: str) -> list[str]:
    """What a column of a file of rows holds, empty where a row has nothing."""
    rows = _load_rows([file], "--prompt_file")
    if column not in rows.column_names:
        raise ValueError(
            f"--prompt_file: '{file}' has no column {column!r}. It has {', '.join(map(repr, rows.column_names))}. Name "
            "the one of the prompts with --caption_column."
        )
    kind = rows.features[column]
    if not isinstance(kind, Value) or kind.dtype not in ("string", "large_string"):
        raise ValueError(f"--prompt_file: the column {column!r} of '{file}' holds no texts, but {kind}.")
    return [(text or "").strip() for text in rows[column]]


def source_of(args: argparse.Namespace) -> str:
    """The argument that names the data, as it was given."""
    name = next(name for name in SOURCES if getattr(args, name, None))
    value = getattr(args, name)
    return f"--{name} {' '.join(value) if isinstance(value, list) else value}"


def load_samples(args: argparse.Namespace) -> TrainingSamples:
    """
    The samples that the arguments name.

    Raises:
        ValueError, OSError: if there is no such data, or if it lacks a column.
    """
    root = None
    if args.dataset_name:
        with _named(f"--dataset_name '{args.dataset_name}'"):
            rows = load_dataset(args.dataset_name, args.dataset_config_name, split=args.dataset_split)
    elif args.train_data_file:
        rows, root = _load_files(args.train_data_file)
    else:
        rows, root = _load_folder(Path(args.instance_data_dir), args)
    if not len(rows):
        source = args.dataset_name or ", ".join(args.train_data_file or [args.instance_data_dir])
        raise ValueError(f"The data '{source}' holds no row.")
    if args.max_train_samples is not None:
        rows = rows.select(range(min(args.max_train_samples, len(rows))))
    return TrainingSamples(_undecoded(rows), args, root)


def _load_files(files: list[str]) -> tuple[Dataset, Path]:
    suffixes = {Path(name).suffix for name in files}
    if len(suffixes) != 1 or not suffixes <= {".parquet", ".jsonl", ".json"}:
        raise ValueError(f"--train_data_file must be files of one kind, .parquet, .jsonl or .json, got {files}.")
    missing = [name for name in files if not Path(name).is_file()]
    if missing:
        raise FileNotFoundError(f"--train_data_file: there is no file {', '.join(missing)}.")
    return _load_rows(files, "--train_data_file"), Path(files[0]).parent


def _load_rows(files: list[str], argument: str) -> Dataset:
    """The rows of files of one kind.

    Raises:
        ValueError: if one is empty or broken, with its name and, if it has lines of JSON, the line.
    """
    for name in files:
        if not Path(name).stat().st_size:
            raise ValueError(f"{argument}: '{name}' is empty.")
    kind = TABLES[Path(files[0]).suffix.lower()]
    with _named(f"{argument} {', '.join(map(repr, files))}", lambda: _broken_line(files)):
        return load_dataset(kind, data_files=files, split="train")


@contextmanager
def _named(source: str, more: Callable[[], str] = str) -> Iterator[None]:
    """Errors of `datasets`, which tell neither file nor argument, with the source of the data and their first cause."""
    try:
        yield
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"{source} cannot be read: {more() or cause}") from error


def _broken_line(files: list[str]) -> str:
    """What is wrong with the first line that is no JSON object, of files that have one a line; empty if nothing is."""
    for name in files:
        if Path(name).suffix.lower() != ".jsonl":
            continue
        with open(name, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except ValueError as error:
                    return f"line {number} of '{name}' is no JSON: {error}"
                if not isinstance(row, dict):
                    return f"line {number} of '{name}' is no JSON object."
    return ""


def _load_folder(folder: Path, args: argparse.Namespace) -> tuple[Dataset, Path]:
    """Images described by a metadata file with a column `file_name`, or images alone, for --instance_prompt."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--instance_data_dir: there is no folder '{folder}'.")
    described = [folder / name for name in METADATA_FILES if (folder / name).is_file()]
    if described:
        rows = _load_rows([str(described[0])], "--instance_data_dir")
        if "file_name" in rows.column_names and args.image_column not in rows.column_names:
            rows = rows.add_column(args.image_column, rows["file_name"])
        return rows, folder
    names = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
    )
    if not names:
        raise ValueError(f"--instance_data_dir: '{folder}' holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    return Dataset.from_dict({args.image_column: names, "file_name": names}), folder


def _undecoded(rows: Dataset) -> Dataset:
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows
