"""Prompt files of all benchmarks, and the command that draws them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bagel_cli import main
from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, golden_image


GENEVAL = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a red circle"},
    {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "blue"}], "prompt": "a blue stär"},
]


@pytest.fixture(scope="session")
def saved(model, processor, tmp_path_factory) -> str:
    """The tiny checkpoint in diffusers' layout, with image sizes that it can take."""
    folder = tmp_path_factory.mktemp("saved")
    BagelPipeline.from_pretrained(CHECKPOINT, transformer=model, processor=processor).save_pretrained(folder)
    return str(folder)


def run_bench(saved: str, benchmark: str, prompts: Path | str, out: Path, *arguments: str) -> int:
    """The exit code of `bagel bench` with few steps."""
    place = ["--prompts", str(prompts), "--out", str(out), "--model", saved]
    return main(["bench", benchmark, *place, "--steps", "2", "--dtype", "float32", "--no-think", *arguments])


@pytest.fixture
def bench(saved, tmp_path, capsys) -> Callable:
    """`bench("wise", prompts, "out", "--seed", "1")`: the exit code, and what was printed and told."""

    def run(benchmark: str, prompts: Path | str, out: str = "out", *arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_bench(saved, benchmark, prompts, tmp_path / out, *arguments)
        return code, *capsys.readouterr()

    return run


def write_lines(file: Path, rows: list[Any]) -> Path:
    """Rows as JSON Lines; a text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def write_json(file: Path, values: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values), encoding="utf-8")
    return file


def write_image(file: Path, name: str = "wide") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    golden_image(name).convert("RGB").save(file)
    return file


def files_below(folder: Path) -> dict[str, bytes]:
    """All files, by their names below a folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def pictures_of(folder: Path) -> dict[str, bytes]:
    return files_below(folder / "images")


def records_of(folder: Path) -> list[dict[str, Any]]:
    lines = [line for file in sorted(folder.glob("records-*")) for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]
