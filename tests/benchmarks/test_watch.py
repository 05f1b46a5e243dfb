"""The benchmark of the training's watch takes real steps of both kinds."""

from __future__ import annotations

import math
from pathlib import Path

from accelerate.state import AcceleratorState


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_watched_steps_and_the_look_at_pixels_are_measured(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from watch import main

    AcceleratorState._reset_state(True)
    main(["--widths", "golden", "--repeats", "1"])
    pixels, row = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if "golden" in line]
    decode, check, share = (float(cell.split()[0]) for cell in pixels[1:])
    assert decode > check > 0 and math.isclose(share, check / decode, rel_tol=0.05)
    watched, unwatched, _, ratio = (float(cell.split()[0]) for cell in row[1:])
    assert watched > 0 and unwatched > 0
    assert math.isclose(ratio, watched / unwatched, rel_tol=0.01)
