"""The GenEval of shapes, from prompts to a table."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import geneval
import language
import numpy as np
import pytest
from world import Scene, render

from bagel_cli import main as bagel
from tests.shapes.conftest import CHECKPOINT
from tests.shapes.test_checkpoint import scene


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return geneval.make_rows(8, seed=3)


def parsed(prompt: str) -> Scene:
    """The scene that a prompt without relations describes, at places where its objects do not touch."""
    text, _, background = prompt.rpartition(" on ")
    things = [
        f"a medium {part.split(' ', 1)[1]} {language.PLACES[2 * n]}" for n, part in enumerate(text.split(" and "))
    ]
    return scene(f"{' and '.join(things)} on a {background} background")


def test_there_are_as_many_prompts_of_each_kind_all_different_and_the_same_by_seed(rows, tmp_path):
    assert Counter(row["tag"] for row in rows) == dict.fromkeys(geneval.KINDS, 8)
    assert len({(row["tag"], row["prompt"]) for row in rows}) == len(rows)
    assert rows == geneval.make_rows(8, seed=3) != geneval.make_rows(8, seed=4)
    geneval.main(["prompts", str(tmp_path / "prompts.jsonl"), "--num", "8", "--seed", "3"])
    assert [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()] == rows


def test_a_picture_of_what_the_prompt_says_is_right_and_another_is_not(rows):
    for row in rows:
        if row["tag"] == "position":
            continue
        there = parsed(row["prompt"])
        assert geneval.is_right(geneval.read(render(there)), row), row
        fewer = replace(there, things=there.things[1:])
        other = next(shape for shape in language.SHAPES if shape not in {thing.shape for thing in there.things})
        reshaped = replace(there, things=(replace(there.things[0], shape=other), *there.things[1:]))
        assert not geneval.is_right(fewer, row) and not geneval.is_right(reshaped, row)


RED, BLUE = "a medium red star", "a medium blue circle"
JUDGED = [
    # Colours count where they are asked for, and belong to their objects.
    ("colors", [{"class": "star", "count": 1, "color": "red"}], f"{RED} at the top", True),
    ("colors", [{"class": "star", "count": 1, "color": "blue"}], f"{RED} at the top", False),
    ("single_object", [{"class": "star", "count": 1}], f"{RED} at the top", True),
    (
        "color_attr",
        [{"class": "star", "count": 1, "color": "blue"}, {"class": "circle", "count": 1, "color": "red"}],
        f"{RED} at the top and {BLUE} at the left",
        False,
    ),
    # More objects than are asked for do not matter, unless they are counted.
    ("single_object", [{"class": "star", "count": 1}], f"{RED} at the top and {BLUE} at the left", True),
    ("counting", [{"class": "star", "count": 1}], f"{RED} at the top and a large white star at the left", False),
    # Positions are relative to the object that is named by its place in the list.
    (
        "position",
        [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": ["above", 0]}],
        f"{RED} at the top and {BLUE} at the left",
        True,
    ),
    (
        "position",
        [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": ["left of", 0]}],
        f"{RED} at the top and {BLUE} at the left",
        False,
    ),
]


@pytest.mark.parametrize(("kind", "include", "objects", "right"), JUDGED)
def test_pictures_are_judged_by_the_rules_of_geneval(kind, include, objects, right):
    row = {"tag": kind, "include": include}
    if kind == "counting":
        row["exclude"] = [{"class": "star", "count": 2}]
    assert geneval.is_right(scene(f"{objects} on a yellow background"), row) is right


def write_run(folder, rows: list[dict], right: list[list[bool]]):
    """A run of true renderings, and of empty pictures where one is to be wrong."""
    for number, (row, samples) in enumerate(zip(rows, right, strict=True)):
        place = folder / "images" / f"{number:05}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps(row))
        for sample, good in enumerate(samples):
            there = parsed(row["prompt"])
            render(there if good else Scene(there.background, ())).save(place / "samples" / f"{sample:05}.png")
    return folder


def plain_rows(num: int) -> list[dict]:
    """Prompts whose pictures are rendered from their words."""
    return [row for row in geneval.make_rows(num) if row["tag"] in ("colors", "two_object")]


def test_the_table_holds_means_of_kinds_and_intervals_around_them(tmp_path):
    rows, generator = plain_rows(12), random.Random(0)
    right = [[generator.random() < 0.7, generator.random() < 0.7] for _ in rows]
    scores = geneval.score(write_run(tmp_path / "run", rows, right))
    made = {row["kind"]: row for row in geneval.table([scores])}
    for kind in ("two_object", "colors"):
        expected = np.mean([np.mean(samples) for row, samples in zip(rows, right, strict=True) if row["tag"] == kind])
        mean, low, high = made[kind]["scores"][0]
        assert mean == pytest.approx(expected) and low < mean < high
    mean, low, high = made["overall"]["scores"][0]
    assert mean == pytest.approx(np.mean([made[kind]["scores"][0][0] for kind in ("two_object", "colors")]))
    # The overall interval is narrower than those of its kinds, and both are as wide as of so many prompts.
    widths = [high - low for _, low, high in (row["scores"][0] for row in made.values())]
    assert widths[-1] < min(widths[:-1])
    spread = np.concatenate([values - values.mean() for values in scores.shares.values()]).std()
    assert widths[-1] == pytest.approx(2 * 1.96 * spread / np.sqrt(len(rows)), rel=0.15)


def test_two_runs_side_by_side_are_compared_prompt_by_prompt(tmp_path, capsys):
    rows, generator = plain_rows(12), random.Random(1)
    right = [[generator.random() < 0.5] for _ in rows]
    # The other run is wrong wherever this one is, and in one prompt more of each kind.
    worse = [list(samples) for samples in right]
    for kind in ("two_object", "colors"):
        worse[next(place for place, row in enumerate(rows) if row["tag"] == kind and right[place][0])] = [False]
    one, two = write_run(tmp_path / "one", rows, right), write_run(tmp_path / "two", rows, worse)
    geneval.main(["score", str(one), str(two), "--json", str(tmp_path / "table.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| kind | prompts | one | two | two - one |" and len(lines) == 5
    overall = json.loads((tmp_path / "table.json").read_text())["rows"][-1]
    mean, low, high = overall["difference"]
    assert mean == pytest.approx(-1 / 12) and low < mean < high <= 0
    # Far narrower than if the two were of different prompts.
    alone = [high - low for _, low, high in overall["scores"]]
    assert high - low < 0.6 * min(alone)
    assert lines[-1].endswith(f"| -8.3 ({100 * low:+.1f} to {100 * high:+.1f}) |")


def test_runs_that_cannot_be_scored_are_refused(tmp_path, capsys):
    def told(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            geneval.main([*map(str, arguments)])
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    rows = plain_rows(3)
    run = write_run(tmp_path / "run", rows, [[True, False]] * len(rows))
    assert "has no pictures in GenEval's layout." in told("score", tmp_path)
    other = write_run(tmp_path / "other", rows[::-1], [[True, False]] * len(rows))
    assert "'run' and 'other' are of other prompts or numbers of pictures." in told("score", run, other)
    (run / "images" / "00001" / "samples" / "00001.png").unlink()
    assert "00001' has 1 pictures instead of 2: finish the run." in told("score", run)
    few = write_run(tmp_path / "few", rows[:4], [[True]] * 4)
    assert "few' has one prompt only of colors: an interval needs two." in told("score", few)
    assert "one run or two can be compared, got 3." in told("score", run, run, run)
    assert "--num must be at least 2, got 1." in told("prompts", tmp_path / "p.jsonl", "--num", "1")


@pytest.mark.slow
def test_the_whole_way_from_prompts_to_a_table(tmp_path, capsys):
    prompts, run = str(tmp_path / "prompts.jsonl"), str(tmp_path / "run")
    geneval.main(["prompts", prompts, "--num", "2"])
    settings = ["--steps", "10", "--samples", "1", "--dtype", "float32", "--guidance-scale", "3"]
    assert bagel(["bench", "geneval", "--prompts", prompts, "--out", run, "--model", str(CHECKPOINT), *settings]) == 0
    geneval.main(["score", run, "--json", str(tmp_path / "table.json")])
    made = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["kind"] for row in made] == [*geneval.KINDS, "overall"]
    assert made[-1]["prompts"] == 12 and made[-1]["scores"][0][0] > 0.3
    assert capsys.readouterr().out.count("\n") == 10
