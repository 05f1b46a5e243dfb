# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run: of which settings it is, what is drawn, and how long it took. Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .benchmarks import Picture


PICTURES, SETTINGS, REPORT, RECORDS = "images", "settings.json", "report.json", "records"
PARTIAL, LOCK = ".partial", ".lock"


def content_hash(file: Path) -> str:
    """By which a source picture is known again."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


class RunFolder:
    """
    Where the processes of a run write.

    Args:
        path (`Path`): The folder, which need not be there yet.
        rank (`int`, *optional*, defaults to 0): Number of this process.
    """

    def __init__(self, path: Path, rank: int = 0):
        self.path = path
        self.pictures = path / PICTURES
        self.rank = rank
        self._recording = threading.Lock()

    @contextmanager
    def opened(self, settings: dict[str, Any]) -> Iterator[None]:
        """
        Begin or resume a run, which no other process of this number does at the same time.

        Raises:
            ValueError: if another run is going on there, or the folder is of other settings, which are named, or of
                something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"'{self.path}' is a file: name a folder.")
        if self.path.is_dir() and any(self.path.iterdir()) and not self._is_of_a_run():
            raise ValueError(f"'{self.path}' holds no run, but other files: name a new folder.")
        (self.path / PARTIAL).mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            with FileLock(self.path / f"{LOCK}-settings"):
                try:
                    held.enter_context(FileLock(self.path / f"{LOCK}-{self.rank}", timeout=0))
                except Timeout as error:
                    raise ValueError(
                        f"'{self.path}' is being written by another run: wait for it, or end it."
                    ) from error
                self._claim(settings)
            self.pictures.mkdir(exist_ok=True)
            yield

    def _is_of_a_run(self) -> bool:
        return (self.path / SETTINGS).is_file() or (self.path / PARTIAL).is_dir()

    def _claim(self, settings: dict[str, Any]) -> None:
        """The first process to come says of which settings the folder is; the others, and later runs, must agree."""
        file = self.path / SETTINGS
        drawn = any(self.path.glob(f"{RECORDS}-*")) or any(self.pictures.rglob("*.png"))
        if not file.exists() or not (drawn or self._others_run()):
            # Nothing was drawn with them, and nothing will be.
            self._write_json(file, settings)
        found = differences(json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(settings)))
        if found:
            raise ValueError(f"'{self.path}' is of a run with other settings: {'; '.join(found)}.")

    def _others_run(self) -> bool:
        """Whether processes of other numbers are at it, asked while none can begin."""
        for file in self.path.glob(f"{LOCK}-[0-9]*"):
            if file.name != f"{LOCK}-{self.rank}":
                try:
                    with FileLock(file, timeout=0):
                        pass
                except Timeout:
                    return True
        return False

    def check_pictures(self, pictures: Sequence[Picture]) -> None:
        """
        Refuse to go on where other prompts were drawn, or other pictures edited.

        Args:
            pictures (`Sequence[Picture]`): Of this run.

        Raises:
            ValueError: naming a picture, and both of its prompts or its source.
        """
        asked = {picture.file: picture for picture in pictures}
        for record in self.records():
            file, prompt, sources = record["file"], record["prompt"], record.get("sources", [])
            if file not in asked:
                if (self.pictures / file).exists():
                    raise ValueError(f"'{self.path}' has the picture '{file}', which these prompts do not ask for.")
                continue
            if asked[file].prompt != prompt:
                raise ValueError(f"'{self.path}': '{file}' was drawn of {prompt!r}, not of {asked[file].prompt!r}.")
            if len(sources) != len(asked[file].images):
                raise ValueError(
                    f"'{self.path}': '{file}' was made of {len(sources)} pictures, and now {len(asked[file].images)} are given."
                )
            for source, known in zip(asked[file].images, sources, strict=True):
                if source.exists() and content_hash(source) != known:
                    raise ValueError(f"'{self.path}': '{file}' was made of another picture than '{source}' is now.")

    def write(self, file: str, save: Callable[[Path], Any]) -> None:
        """Let a function write a picture or text file, which then appears at once."""
        target, partial = self.pictures / file, self._partial(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            save(partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def _partial(self, file: str) -> Path:
        return self.path / PARTIAL / f"{self.rank}-{threading.get_ident()}{Path(file).suffix}"

    def record(self, **values: Any) -> None:
        """Add a line about a picture."""
        line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
        with self._recording, (self.path / f"{RECORDS}-{self.rank}.jsonl").open("ab+") as stream:
            if end := stream.seek(0, os.SEEK_END):
                stream.seek(end - 1)
                # A crash may have cut the last line off, and this one must not go on with it.
                line = line if stream.read(1) == b"\n" else b"\n" + line
            stream.write(line)

    def records(self) -> list[dict[str, Any]]:
        """The lines of all processes; one that a crash cut off is left out."""
        found = []
        for file in sorted(self.path.glob(f"{RECORDS}-*.jsonl")):
            # Not `splitlines`, which ends a line at characters that a prompt may hold.
            for line in file.read_bytes().split(b"\n"):
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue
        return found

    def report(self, report: dict[str, Any]) -> None:
        """Write what the run was."""
        self._write_json(self.path / REPORT, report)

    def _write_json(self, file: Path, values: dict[str, Any]) -> None:
        partial = self._partial(file.name)
        partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, file)


def differences(there: dict[str, Any], here: dict[str, Any], name: str = "") -> list[str]:
    """What two settings differ in, each as `name is 25, not 49`: there, not here."""
    found = []
    for key in [*there, *(key for key in here if key not in there)]:
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name}{key}.")
        elif old != new:
            found.append(f"`{name}{key}` is {old!r} there, and {new!r} here")
    return found
