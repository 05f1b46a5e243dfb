"""The benchmark of pictures has a row for every means, and for sums of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_each_means_is_a_row(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pictures
    import step_caches

    make_pipeline = functools.partial(step_caches.make_pipeline, "golden")
    monkeypatch.setattr(step_caches, "make_pipeline", lambda width, *args: make_pipeline(*args))
    monkeypatch.setattr(pictures, "STEPS", 10)
    file = tmp_path / "pictures.json"
    pictures.main(["--num", "1", "--side", "32", "--json", str(file)])
    tables = json.loads(file.read_text())
    names = [means.name for means in pictures.every_means(tmp_path)]
    for table in (tables["shapes"], tables["middle"]):
        assert list(table) == names
        # Guidance of a drawing ends at a noise level of 0.4.
        assert [table["plain"][task]["forwards"] for task in ("drawing", "edit")] == pytest.approx([19, 30])
        assert [table["few-step adapter"][task]["forwards"] for task in ("drawing", "edit")] == pytest.approx([6, 6])
        assert all(
            row["forwards"] <= table["plain"][task]["forwards"] for own in table.values() for task, row in own.items()
        )
    assert tables["shapes"]["plain"]["drawing"]["score"] == 1
    assert tables["middle"]["plain"]["drawing"]["score"] is None
