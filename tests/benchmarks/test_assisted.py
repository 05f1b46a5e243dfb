# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of assisted decoding counts forwards of texts that are those without an assistant."""

from __future__ import annotations

import json
from pathlib import Path


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_all_ways_write_the_same_texts(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import assisted

    out = tmp_path / "assisted.json"
    assisted.main(["--num", "1", "--seconds", "0.1", "--tokens", "16", "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
    assert all(row["equal"] == row["texts"] for row in rows)
    plain = [row for row in rows if row["candidates"] == "none"]
    assert len(plain) == 3 and all(row["forwards"] == row["tokens"] for row in plain)
    again = next(row for row in rows if "thought" in row["text"] and row["candidates"].startswith("looked up"))
    assert again["forwards"] < again["tokens"]
