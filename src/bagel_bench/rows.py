# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Prompt files as the benchmarks publish them, row by row: what is wrong with one row leaves the others as they are."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image


class BrokenRow(ValueError):
    """What is wrong with a row, without where it stands."""


@dataclass(frozen=True)
class Row:
    """
    A row of a prompt file.

    Attributes:
        where (`str`): For messages, such as `"line 7"`.
        number (`int`): From 0; broken rows count.
        values: Its fields, or why it could not be read.
    """

    where: str
    number: int
    values: dict[str, Any] | BrokenRow

    @property
    def fields(self) -> dict[str, Any]:
        """
        Raises:
            BrokenRow: if it could not be read.
        """
        if isinstance(self.values, BrokenRow):
            raise self.values
        return self.values

    def text(self, field: str) -> str:
        """
        A field that holds words.

        Raises:
            BrokenRow: if it does not.
        """
        value = self._value(field)
        if not isinstance(value, str) or not value.strip():
            raise BrokenRow(f"`{field}` must be a text, got {value!r}.")
        return value

    def name(self, field: str) -> str:
        """
        A field that names a file: words or a number, of which no path leads elsewhere.

        Raises:
            BrokenRow: if it does not.
        """
        value = self._value(field)
        name = str(value)
        is_name = isinstance(value, str | int) and not isinstance(value, bool)
        if not is_name or not name.strip() or name in (".", "..") or set(name) & set("/\\:\0"):
            raise BrokenRow(f"`{field}` must be the name of a file, got {value!r}.")
        return name

    def images(self, field: str, folder: Path) -> tuple[Path, ...]:
        """
        A field that names one picture file, or a list of them.

        Raises:
            BrokenRow: if one is missing, or is no picture.
        """
        value = self._value(field)
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise BrokenRow(f"`{field}` must name a picture, or several, got {value!r}.")
        files = tuple(folder / name for name in names)
        for file in files:
            try:
                PIL.Image.open(file).close()
            except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
                reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
                raise BrokenRow(f"the picture '{file}' {reason}.") from error
        return files

    def _value(self, field: str) -> Any:
        if field not in self.fields:
            raise BrokenRow(f"the field `{field}` is missing.")
        return self.fields[field]


class _Repeated(dict):
    """A JSON object in which a name stands twice: `pairs` keeps both."""

    pairs: list[tuple[str, Any]] = []


def read_rows(prompts: Path) -> list[Row]:
    """
    The rows of a prompt file, or of a folder of files.

    Args:
        prompts (`Path`): `.jsonl`, a row a line; `.json`, a list of rows or an object of them by `key`; `.csv`; or a folder
            with a prompt in each `.txt`, named `item_id`, or with an `annotation.json` in each folder, named `type`.

    Raises:
        ValueError: if it is nothing of this.
    """
    readers = {".jsonl": _lines, ".json": _json, ".csv": _csv}
    try:
        if prompts.is_dir():
            found = list(_folder(prompts))
        elif prompts.suffix in readers:
            found = list(readers[prompts.suffix](prompts))
        else:
            raise ValueError(f"'{prompts}' must be a folder, or end in one of {', '.join(readers)}.")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{prompts}' is not UTF-8: {error}.") from error
    if not found:
        raise ValueError(f"'{prompts}' holds no prompts.")
    return [Row(where, number, _checked(values)) for number, (where, values) in enumerate(found)]


def _checked(values: Any) -> dict[str, Any] | BrokenRow:
    if isinstance(values, _Repeated):
        names = [name for name, _ in values.pairs]
        return BrokenRow(f"the field `{next(name for name in names if names.count(name) > 1)}` stands twice.")
    if not isinstance(values, dict | BrokenRow):
        return BrokenRow(f"it must be an object with fields, got {values!r:.60}.")
    return values


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    # Not `splitlines`, which ends a line at characters that a prompt may hold.
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield f"line {number}", _parsed(line)
            except json.JSONDecodeError as error:
                yield f"line {number}", BrokenRow(f"it is no JSON ({error}).")


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        found = _parsed(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"'{file}' is no JSON ({error}).") from error
    if isinstance(found, list):
        for number, values in enumerate(found, start=1):
            yield f"row {number}", values
    elif isinstance(found, dict):
        yield from _by_key(found, "key")
    else:
        raise ValueError(f"'{file}' must hold a list of rows or an object of them, got {found!r:.60}.")


def _by_key(rows: dict[str, Any], field: str, **more: str) -> Iterator[tuple[str, Any]]:
    for key, values in rows.pairs if isinstance(rows, _Repeated) else rows.items():
        plain = isinstance(values, dict) and not isinstance(values, _Repeated)
        yield f"key '{key}'", values | {field: key} | more if plain else values


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    """The rows that differ in more than the question: a prompt has a row for each of these."""
    seen = set()
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream)
        for values in rows:
            prompt = values.get("item_id"), values.get("text")
            if prompt not in seen:
                seen.add(prompt)
                yield f"line {rows.line_num}", values


def _folder(folder: Path) -> Iterator[tuple[str, Any]]:
    for file in sorted(folder.glob("*.txt")):
        yield file.name, {"item_id": file.stem, "text": file.read_text(encoding="utf-8-sig").strip()}
    for file in sorted(folder.glob("*/annotation.json")):
        kind = file.parent.name
        try:
            rows = _parsed(file.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise ValueError(f"'{file}' is no JSON ({error}).") from error
        for where, values in _by_key(rows, "id", type=kind):
            yield f"{kind}, {where}", values


def _parsed(text: str) -> Any:
    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        repeated = _Repeated(found)
        repeated.pairs = pairs
        return repeated

    return json.loads(text, object_pairs_hook=made)
