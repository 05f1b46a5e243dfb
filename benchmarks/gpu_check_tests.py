# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A plugin of pytest: tells `gpu_check.py` of each test when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lines import Lines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, help="file that each test's result is written to")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Telling(Lines(config.getoption("--lines"))))


class Telling:
    """
    Args:
        lines ([`Lines`])
    """

    def __init__(self, lines: Lines):
        self.lines = lines
        self.left_out: list[pytest.Item] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.lines.write(done=report.nodeid, outcome="failed", reason=_last_line(report.longreprtext), seconds=0.0)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """By `-m "not slow"`, which the small form is asked with."""
        self.left_out += items

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        items = [item for item in session.items + self.left_out if isinstance(item, pytest.Function)]
        abouts = {item.nodeid: _first_line(item.module.__doc__ or "") for item in items}
        self.lines.write(items=list(abouts), abouts=abouts)
        for item in self.left_out:
            self.lines.write(done=item.nodeid, outcome="skipped", reason="slow: not in the small form", seconds=0.0)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.lines.write(began=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's call, or what kept it from being called, or failed behind it."""
        if report.when != "call" and report.passed:
            return
        reason = ""
        if report.skipped:
            # Of a skip: file, line, and "Skipped: ..."
            reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        elif report.failed:
            reason = _last_line(report.longreprtext)
        errors = [value for name, value in report.user_properties if name == "error"]
        self.lines.write(
            done=report.nodeid, outcome=report.outcome, reason=reason, seconds=report.duration, errors=errors
        )

    def pytest_exception_interact(self, node: Any, call: pytest.CallInfo) -> None:
        """An error of the device itself leaves nothing usable behind: the rest is for a new process."""
        if call.excinfo is not None and isinstance(call.excinfo.value, torch.AcceleratorError):
            node.session.shouldstop = "the device failed"


def _first_line(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _last_line(text: str) -> str:
    """What went wrong: pytest marks it by E, and the first of such lines says it."""
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return marked[0] if marked else text.strip().splitlines()[-1]
