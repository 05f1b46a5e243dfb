# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The losses of all stages as a picture: `python examples/shapes/curve.py shapes curve.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402  # after the choice of a backend without a display
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402


Curve = tuple[list[int], list[float]]


def logged(file: Path, name: str) -> Curve:
    """Steps and values from the log of a stage that trains a part alone."""
    lines = {line["step"]: line[name] for line in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    return list(lines), list(lines.values())


def tracked(folder: Path, name: str) -> Curve:
    """Steps and values from the tensorboard files of `train_full.py`."""
    values: dict[int, float] = {}
    for file in sorted(folder.rglob("events.out.tfevents*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file)).Reload()
        if name in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(name)}
    return list(values), list(values.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the output folder of train.py")
    parser.add_argument("output", help="where to write the picture")
    args = parser.parse_args()
    curves = {
        "VAE: squared error": logged(args.run / "vae" / "log.jsonl", "mse"),
        "tower: loss of the tags": logged(args.run / "vit" / "log.jsonl", "loss"),
        "understanding: loss of texts": tracked(args.run / "understanding" / "training" / "logs", "ce_loss"),
        "joint: loss of texts": tracked(args.run / "joint" / "training" / "logs", "ce_loss"),
        "joint: loss of velocities": tracked(args.run / "joint" / "training" / "logs", "mse_loss"),
    }
    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.8), constrained_layout=True)
    for axis, (title, (steps, values)) in zip(axes, curves.items(), strict=True):
        axis.plot(steps, values, linewidth=0.8)
        axis.set(title=title, xlabel="step", yscale="log")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
