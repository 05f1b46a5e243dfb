"""What pages say was measured is what lies in benchmarks/results, and what was made is what its command makes."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(page: str, heading: str) -> dict[str, list[str]]:
    """Cells by the name of their row, of the first table behind a heading."""
    lines = page.partition(f"{heading}\n")[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    end = next((number for number in range(start, len(lines)) if not lines[number].startswith("|")), len(lines))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : end]]
    return {name: cells for name, *cells in rows}


def percent(share: float, digits: int) -> str:
    return f"{share:.{digits}%}".replace("%", " %")


def test_the_page_of_step_caches_has_the_ratios_and_rows_of_its_file():
    page, found = read("docs/step_caches.md"), results("step_caches.json")
    shapes, middle = found["shapes"], found["middle"]
    ratios = re.search(r"for 25 steps.*?```\n(.*?)```", page, flags=re.DOTALL).group(1)
    assert [float(ratio) for ratio in ratios.split(",")] == shapes.pop("mag_ratios")["25"]

    def cells(row: dict[str, Any]) -> list[str]:
        psnr = "–" if row["psnr"] is None else f"{row['psnr']:.1f}"
        return [f"{row['forwards']:.1f}", f"{row['latents']:.3f}", psnr, percent(row["score"], 0)]

    expected = {
        name: [
            *cells(row["drawing"]),
            *cells(row["edit"]),
            f"{middle[name]['drawing']['forwards']:.1f}",
            f"{middle[name]['drawing']['seconds']:.2f}",
        ]
        for name, row in shapes.items()
    }
    assert {name.strip("`"): row for name, row in table(page, "## Figures").items()} == expected
    assert f"Of {found['num']} drawings" in page and f"--num {found['num']} --json benchmarks/results/" in page


def test_the_page_of_few_steps_has_the_rows_of_its_file():
    found = results("few_steps.json")
    forwards, tasks = found["forwards"], ("draw_full", "draw_with_plan", "relation", "edit")
    names = {f"without the adapter, {steps} steps": f"{steps}_plain_steps" for steps in (25, 49)}
    names |= {f"{steps} step{'s' * (steps > 1)}": f"{steps}_steps" for steps in (1, 2, 4, 6, 8)}
    expected = {}
    for name, row in names.items():
        drawing, plan, relation, edit = (f"{forwards[f'{task}_{row}']:g}" for task in tasks)
        assert drawing == plan == relation
        counts = drawing if edit == drawing else f"{drawing}, edits {edit}"
        expected[name] = [counts, *(percent(found[f"{task}_{row}"], 1) for task in tasks)]
    page = read("docs/few_steps.md")
    assert table(page, "## On bagel-shapes") == expected
    assert f"--num {found['num']} --json benchmarks/results/few_steps.json" in page
    assert len(forwards) == len(tasks) * len(names) == len(found) - len({"num", "seed", "forwards"})


def test_the_adapter_of_six_steps_is_made_by_the_command_that_the_page_names(monkeypatch, tmp_path):
    """Its schedule ends with its last step, so that another number of them makes another adapter."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "shapes"))
    few_steps = importlib.import_module("few_steps")
    section = read("docs/few_steps.md").partition("## On bagel-shapes\n")[2]
    command, steps, batch = re.search(
        r"made by `python examples/shapes/few_steps.py (.*?)`: (\d+) updates by (\d+) drawings", section
    ).groups()
    commands: list[list[str]] = []
    monkeypatch.setattr(few_steps, "write_dataset", lambda *args: None)
    monkeypatch.setattr(few_steps.subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.chdir(tmp_path)
    few_steps.main(command.split())
    (training,) = commands
    assert training[training.index("--max_train_steps") + 1] == steps == "200"
    assert training[training.index("--train_batch_size") + 1] == batch


@pytest.mark.parametrize(("page", "heading"), [("README.md", "## Fewer forwards"), ("docs/speed.md", "# Speed")])
def test_the_pages_of_speed_have_the_rows_of_its_file(page, heading):
    found = results("pictures.json")

    def cells(row: dict[str, Any], seconds: str) -> str:
        score = [] if row["score"] is None else [percent(row["score"], 0)]
        return ", ".join([f"{row['forwards']:.0f}", f"{row['seconds']:{seconds}} s", *score])

    expected = {
        name: [
            *(cells(found["shapes"][name][task], ".2f") for task in ("drawing", "edit")),
            *(cells(found["middle"][name][task], ".1f") for task in ("drawing", "edit")),
        ]
        for name in found["shapes"]
    }
    assert table(read(page), heading) == expected
    assert f"--num {found['num']}`" in read(page)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.name)
def test_no_figure_names_a_place_on_the_machine_that_made_it(file):
    assert not re.search(r'"(/|~|[A-Z]:\\)', file.read_text(encoding="utf-8"))
