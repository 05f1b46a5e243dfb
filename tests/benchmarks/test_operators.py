# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of operators sets each kind of them beside the floor's."""

from __future__ import annotations

from pathlib import Path


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_kinds_add_up_to_the_whole(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import operators

    operators.main(["128 tokens, batch 1", "--width", "golden", "--repeats", "1"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[3:]]
    seconds = {name.strip(): [float(cell.split()[0]) for cell in cells[:2]] for name, *cells in rows}
    assert list(seconds) == [*operators.KINDS, operators.REST, "Python", "all"]
    for column in (0, 1):
        parts = [values[column] for name, values in seconds.items() if name != "all"]
        assert abs(sum(parts) - seconds["all"][column]) < 0.5
    assert min(seconds["products"]) > 0 and seconds[operators.REST][0] > seconds[operators.REST][1]
