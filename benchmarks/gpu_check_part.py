# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Items that a process does one after the other, in a given time, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lines import Lines


ROOT = Path(__file__).parents[1]
# What ends a process that does not end by itself.
NO_TIME, SILENT = "there was no time left", "nothing was heard of it for {:.0f} s"
# Why an item was not done that no process names.
NOT_FOUND = "nothing of it was found"


def is_of(item: str, asked: str) -> bool:
    """Whether an item is what was asked for, or one of the items of it: of a folder, a file, a class, a test with parameters."""
    return item == asked or item.startswith(tuple(asked + mark for mark in ("/", "::", "[")))


@dataclass
class Part:
    """
    Attributes:
        command (`Callable[[list[str]], list[str]]`): That does some items, and tells of them in the file that `--lines FILE`
            names: `began` and `done` of each, `row` of each figure, and `items` if it names them otherwise.
        items (`list[str]`): What is to be done.
        environment (`dict`): Of the process, beside this one's.
        results (`dict`): Of each item its `outcome`, `reason`, `seconds`, and what else the process told.
        rows (`list[dict]`): Figures.
        abouts (`dict`): What items are about.
    """

    command: Callable[[list[str]], list[str]]
    items: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    abouts: dict[str, str] = field(default_factory=dict)

    def run(self, deadline: float, item_limit: float) -> None:
        """
        Do all items. A process that ends, or says nothing for long, is lost with the item that it was at; another does the rest.

        Args:
            deadline (`float`): Of `time.monotonic()`.
            item_limit (`float`): Seconds after which a silent process is given up.
        """
        while self._missing() and time.monotonic() < deadline:
            num_results = len(self.results)
            began, end = self._run_process(deadline, item_limit)
            if end == NO_TIME:
                break
            if began in self._missing():
                self._lose([began], "cut off" if end == SILENT.format(item_limit) else "failed", end)
            elif len(self.results) == num_results:
                # Another process would come no farther.
                self._lose(self._missing(), "failed", end)
        self._lose(self._missing(), "cut off", NO_TIME)

    def _missing(self) -> list[str]:
        return [item for item in self.items if item not in self.results]

    def _lose(self, items: list[str], outcome: str, reason: str) -> None:
        self.results |= {item: {"outcome": outcome, "reason": reason, "seconds": 0.0} for item in items}

    def _run_process(self, deadline: float, item_limit: float) -> tuple[str, str]:
        """What a process began last, and how it ended."""
        with tempfile.TemporaryDirectory() as folder:
            lines = Lines(Path(folder, "lines"))
            # What it prints is for who watches; and it may have processes of its own, which end with it.
            process = subprocess.Popen(
                [*self.command(self._missing()), "--lines", str(lines.file)],
                # Items are named from here, wherever this is called.
                cwd=ROOT,
                env=os.environ | self.environment,
                stdout=sys.stderr,
                start_new_session=True,
            )
            try:
                end = self._wait(process, lines, deadline, item_limit)
            finally:
                # Those that outlive it, too: who reads what they print would wait for them.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            told = lines.read()
        for line in told:
            self._take(line)
        began = [line["began"] for line in told if "began" in line]
        return began[-1] if began else "", end

    def _wait(self, process: subprocess.Popen, lines: Lines, deadline: float, item_limit: float) -> str:
        """Until the process ends, or has to."""
        count, heard = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.1)
            now = time.monotonic()
            if (found := len(lines.read())) > count:
                count, heard = found, now
            if now >= deadline:
                return NO_TIME
            if now > heard + item_limit:
                return SILENT.format(item_limit)
        return f"its process ended with exit code {process.returncode}"

    def _take(self, line: dict[str, Any]) -> None:
        if "items" in line:
            # What was asked for and is none of these would vanish, and nothing of it would have failed.
            unknown = [asked for asked in self._missing() if not any(is_of(item, asked) for item in line["items"])]
            self._lose(unknown, "failed", NOT_FOUND)
            self.items = [*self.results, *line["items"]]
            self.abouts |= line["abouts"]
        if "row" in line:
            self.rows.append(line["row"])
        if "done" in line:
            result = dict(line)
            self.results[result.pop("done")] = result
