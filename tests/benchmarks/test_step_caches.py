"""The benchmark of step caches counts what is computed, and compares with the plain picture."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


def test_each_means_is_a_row(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import step_caches

    make_pipeline = functools.partial(step_caches.make_pipeline, "golden")
    monkeypatch.setattr(step_caches, "make_pipeline", lambda width, *args: make_pipeline(*args))
    monkeypatch.setattr(step_caches, "MIDDLE_STEPS", 10)
    monkeypatch.setattr(step_caches, "find_spec", lambda name: None)
    file = tmp_path / "step_caches.json"
    step_caches.main(["--num", "0", "--side", "32", "--json", str(file)])
    rows = json.loads(file.read_text())["middle"]
    ratios = rows.pop("mag_ratios")["10"]
    assert ratios[0] == 1.0 and len(ratios) == 10
    found = {name: row["drawing"] for name, row in rows.items()}
    plain = found.pop("plain")
    assert plain["latents"] == 0 and plain["psnr"] is None and plain["score"] is None
    # Guidance ends at a noise level of 0.4.
    assert plain["forwards"] == pytest.approx(10 + 9)
    assert len(found) == 1 + len(step_caches.CONFIGS) + len(step_caches.MAG_THRESHOLDS)
    assert found["enable_taylorseer()"]["forwards"] == pytest.approx(6 + 6)
    assert all(row["forwards"] <= plain["forwards"] + 1e-6 for row in found.values())
    assert all(row["latents"] > 0 and row["psnr"] > 20 for row in found.values() if row["forwards"] < 18)
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["plain", "19.0"]
