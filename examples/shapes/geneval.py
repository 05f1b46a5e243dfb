# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A GenEval of shapes, from prompts to a table: what GenEval's detector does for photos, the reader does here for sure.

    python examples/shapes/geneval.py prompts prompts.jsonl --num 20
    bagel bench geneval --prompts prompts.jsonl --out runs/shapes --model examples/shapes/checkpoint --dtype float32
    python examples/shapes/geneval.py score runs/shapes
    python examples/shapes/geneval.py score runs/shapes runs/other     # both, and their difference

The prompts are lines of GenEval's own format, and the pictures lie in its layout. See docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from judge import unseen_scene
from language import RELATIONS, joined, phrase
from PIL import Image
from reader import read
from scipy.stats import bootstrap
from world import Scene, Thing


KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RESAMPLES = 9999
CONFIDENCE = 0.95


def make_rows(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """As many prompts of each kind, of scenes that were held out from the training."""
    generator = random.Random(f"geneval {seed}")
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        prompts: dict[str, dict[str, Any]] = {}
        while len(prompts) < num:
            row = _row(generator, kind)
            prompts[row["prompt"]] = row
        rows += prompts.values()
    return rows


def _row(generator: random.Random, kind: str) -> dict[str, Any]:
    """A prompt, and of its objects what the kind asks for."""
    scene = _scene(generator, kind)
    first, *others = generator.sample(scene.things, len(scene.things))
    include: list[dict[str, Any]] = [_wanted(thing, kind) for thing in (first, *others)]
    more: dict[str, Any] = {}
    text = joined([phrase(thing, size=False, place=False) for thing in (first, *others)])
    if kind == "counting":
        include = [{"class": first.shape, "count": len(scene.things)}]
        more = {"exclude": [{"class": first.shape, "count": len(scene.things) + 1}]}
    if kind == "position":
        relation = generator.choice([name for name, holds in RELATIONS.items() if holds(first, others[0])])
        text = f"{phrase(first, size=False, place=False)} {relation} {phrase(others[0], size=False, place=False)}"
        # A position is relative to an object that stands before it in the list.
        include = [include[1], include[0] | {"position": [relation, 0]}]
    return {"tag": kind, "include": include} | more | {"prompt": f"{text} on {scene.background}"}


def _scene(generator: random.Random, kind: str) -> Scene:
    """A scene of as many objects as the kind needs: of one shape to be counted, of two shapes to be told apart."""
    while True:
        count = {"single_object": 1, "colors": 1, "counting": generator.choice((2, 3))}.get(kind, 2)
        scene = unseen_scene(generator, count)
        shapes = {thing.shape for thing in scene.things}
        if len(shapes) == (1 if kind == "counting" else count):
            return scene


def _wanted(thing: Thing, kind: str) -> dict[str, Any]:
    colour = {"color": thing.colour} if kind in ("colors", "color_attr") else {}
    return {"class": thing.shape, "count": 1} | colour


def is_right(scene: Scene, row: dict[str, Any]) -> bool:
    """Whether a picture shows what a row includes and not what it excludes, by GenEval's rules: other objects do not matter."""
    found: list[list[Thing]] = []
    for wanted in row["include"]:
        things = [thing for thing in scene.things if thing.shape == wanted["class"]]
        if "color" in wanted:
            things = [thing for thing in things if thing.colour == wanted["color"]]
        if "position" in wanted:
            relation, place = wanted["position"]
            things = [thing for thing in things if all(RELATIONS[relation](thing, other) for other in found[place])]
        if len(things) < wanted["count"]:
            return False
        found.append(things)
    counts = Counter(thing.shape for thing in scene.things)
    return all(counts[unwanted["class"]] < unwanted["count"] for unwanted in row.get("exclude", ()))


@dataclass(frozen=True)
class Scores:
    """
    What a run reached.

    Attributes:
        name (`str`)
        prompts (`dict[str, tuple[str, ...]]`): Of each kind.
        shares (`dict[str, np.ndarray]`): Of each kind and prompt the share of pictures that are right.
        samples (`int`): Pictures of each prompt.
    """

    name: str
    prompts: dict[str, tuple[str, ...]]
    shares: dict[str, np.ndarray]
    samples: int


def score(run: Path) -> Scores:
    """
    Judge the pictures in the folder of a run of `bagel bench geneval`.

    Raises:
        ValueError: if there are none, or a prompt has fewer than another.
    """
    places = sorted(run.glob("images/*/metadata.jsonl"))
    rows = [json.loads(place.read_text(encoding="utf-8")) for place in places]
    pictures = [sorted((place.parent / "samples").glob("*.png")) for place in places]
    samples = max(map(len, pictures), default=0)
    if samples == 0:
        raise ValueError(f"'{run}' has no pictures in GenEval's layout.")
    for place, of_prompt in zip(places, pictures, strict=True):
        if len(of_prompt) < samples:
            raise ValueError(f"'{place.parent}' has {len(of_prompt)} pictures instead of {samples}: finish the run.")
    shares: dict[str, list[float]] = {}
    prompts: dict[str, list[str]] = {}
    for row, of_prompt in zip(rows, pictures, strict=True):
        right = [is_right(read(Image.open(picture)), row) for picture in of_prompt]
        shares.setdefault(row["tag"], []).append(float(np.mean(right)))
        prompts.setdefault(row["tag"], []).append(row["prompt"])
    if short := [kind for kind, values in shares.items() if len(values) < 2]:
        raise ValueError(f"'{run}' has one prompt only of {', '.join(short)}: an interval needs two.")
    return Scores(
        run.name,
        {kind: tuple(texts) for kind, texts in prompts.items()},
        {kind: np.array(values) for kind, values in shares.items()},
        samples,
    )


def interval(*kinds: np.ndarray) -> tuple[float, float, float]:
    """
    The mean over kinds of their means, and what holds 95 % of such means of prompts drawn again, kind by kind.

    The pictures of a prompt are drawn again together: they are alike, and as many independent ones would promise too much.
    """

    def mean(*samples: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([sample.mean(axis) for sample in samples], axis=0)

    drawn = bootstrap(
        kinds,
        mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    low, high = drawn.confidence_interval
    return float(mean(*kinds, axis=-1)), float(low), float(high)


def table(runs: Sequence[Scores]) -> list[dict[str, Any]]:
    """
    A row for each kind and one for all, as GenEval's own summary: the overall score is the mean over the kinds.

    Of two runs there is their difference as well, prompt by prompt: what one prompt makes harder for both cancels.

    Raises:
        ValueError: if the runs are of other prompts.
    """
    first = runs[0]
    for other in runs[1:]:
        if (other.prompts, other.samples) != (first.prompts, first.samples):
            raise ValueError(f"'{first.name}' and '{other.name}' are of other prompts or numbers of pictures.")
    rows = []
    for kind in (*first.shares, "overall"):
        chosen = tuple(first.shares) if kind == "overall" else (kind,)
        row: dict[str, Any] = {"kind": kind, "prompts": sum(len(first.shares[name]) for name in chosen)}
        row["scores"] = [interval(*(run.shares[name] for name in chosen)) for run in runs]
        if len(runs) == 2:
            row["difference"] = interval(*(runs[1].shares[name] - first.shares[name] for name in chosen))
        rows.append(row)
    return rows


def markdown(runs: Sequence[Scores], rows: Sequence[dict[str, Any]]) -> str:
    """The table as it is printed."""
    titles = ["kind", "prompts", *(run.name for run in runs)]
    if len(runs) == 2:
        titles.append(f"{runs[1].name} - {runs[0].name}")
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        cells = [_percent(values) for values in row["scores"]]
        if "difference" in row:
            cells.append(_percent(row["difference"], sign="+"))
        lines.append([row["kind"], str(row["prompts"]), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(values: tuple[float, float, float], sign: str = "") -> str:
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in values)
    return f"{mean} ({low} to {high})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="write a prompt file")
    prompts.add_argument("file", type=Path)
    prompts.add_argument("--num", type=int, default=20, help="of each kind (default: 20)")
    prompts.add_argument("--seed", type=int, default=0, help="another one gives others (default: 0)")
    scores = commands.add_parser("score", help="judge the pictures of one run, or of two side by side")
    scores.add_argument("runs", type=Path, nargs="+", help="folders that `bagel bench geneval` wrote")
    scores.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args(arguments)
    if args.command == "prompts":
        if args.num < 2:
            parser.error(f"--num must be at least 2, got {args.num}.")
        lines = [json.dumps(row) for row in make_rows(args.num, args.seed)]
        args.file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    if len(args.runs) > 2:
        parser.error(f"one run or two can be compared, got {len(args.runs)}.")
    try:
        runs = [score(run) for run in args.runs]
        rows = table(runs)
    except ValueError as error:
        parser.error(str(error))
    print(markdown(runs, rows))
    if args.json:
        values = {"runs": [str(run) for run in args.runs], "samples": runs[0].samples, "rows": rows}
        args.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
