"""The benchmark of pictures has a row for every means, and for sums of them."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


def test_each_means_is_a_row(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pictures
    import step_caches

    make_pipeline = functools.partial(step_caches.make_pipeline, "golden")
    monkeypatch.setattr(step_caches, "make_pipeline", lambda width, *args: make_pipeline(*args))
    monkeypatch.setattr(pictures, "STEPS", 10)
    # The compiler has tests of its own, and takes minutes.
    monkeypatch.setattr(pictures, "compiled", lambda pipe: contextlib.nullcontext())
    file = tmp_path / "pictures.json"
    pictures.main(["--num", "1", "--side", "32", "--json", str(file)])
    tables = json.loads(file.read_text())
    names = [means.name for means in pictures.every_means(tmp_path)]
    # Guidance of a drawing ends at a noise level of 0.4, which the two schedulers reach at different steps.
    for table, expected in ((tables["shapes"], [18, 30]), (tables["middle"], [19, 30])):
        assert list(table) == names
        for means, counts in (("plain", expected), ("few-step adapter", [6, 6])):
            assert [table[means][task]["forwards"] for task in ("drawing", "edit")] == pytest.approx(counts)
        for own in table.values():
            assert all(row["forwards"] <= table["plain"][task]["forwards"] + 1e-6 for task, row in own.items())
    assert tables["shapes"]["plain"]["drawing"]["score"] == 1
    assert tables["middle"]["plain"]["drawing"]["score"] is None
