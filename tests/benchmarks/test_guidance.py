"""The benchmark of guidance counts what it leaves out, and how much that changes."""

from __future__ import annotations

import importlib
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch


ROOT = Path(__file__).parents[2]


@pytest.fixture
def guidance(monkeypatch) -> Any:
    for folder in (ROOT / "examples" / "shapes", ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    # It measures on one thread.
    threads = torch.get_num_threads()
    yield importlib.import_module("guidance")
    torch.set_num_threads(threads)


def test_every_way_is_compared_with_all_branches_at_every_step(guidance):
    names = [name for name, *_ in guidance.ways()]
    rows = list(islice(guidance.pictures(num=2, steps=10), len(names)))
    assert [row["way"] for row in rows] == names and {row["task"] for row in rows} == {"draw_full"}
    plain, *others = rows
    # At ten steps the interval of guidance ends behind the eighth.
    assert plain["forwards"] == 18 and plain["largest_error"] == 0
    assert all(10 < row["forwards"] <= 18 and (row["forwards"] < 18) == (row["mean_error"] > 0) for row in others)
    assert sum(row["forwards"] < 18 for row in others) > len(others) / 2
    found = {row["way"]: row["forwards"] for row in rows}
    assert found["held, computed at one step in 2"] == 10 + 4 and found["held, computed at one step in 5"] == 10 + 2


def test_what_prompts_share_is_measured_beside_the_same_without(guidance, monkeypatch):
    make = guidance.make_pipeline
    monkeypatch.setattr(guidance, "make_pipeline", lambda width, *args: make("golden", *args))
    rows = list(guidance.shared_prompts(repeats=1))
    assert len(rows) == 3 and all(row["shared"] > 0 and row["apart"] > 0 for row in rows)
    assert rows[0]["shared"] < rows[0]["apart"]


def test_numbers_that_measure_nothing_are_refused(guidance, capsys):
    with pytest.raises(SystemExit):
        guidance.main(["--num", "0"])
    assert "--num must be at least 1, got 0." in capsys.readouterr().err
