"""The first lesson, examples/bagel.ipynb: it runs, what it shows is right, and it is the 7B's lesson by one variable."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode
from PIL import Image

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, load_processor


ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "scripts"), str(ROOT / "examples" / "shapes")]

from judge import seen  # noqa: E402  # the scripts are no package
from language import parse_layout  # noqa: E402
from notebook import NOTEBOOK, run  # noqa: E402
from reader import read  # noqa: E402
from world import COLOURS, SIDE  # noqa: E402


GAP = 8


def stored() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def sources(notebook: NotebookNode, kind: str) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def said(notebook: NotebookNode) -> list[str]:
    """All lines that are printed, less losses, which differ between machines."""
    lines = [line for output in outputs(notebook) for line in output.get("text", "").splitlines()]
    return [line for line in lines if "loss" not in line]


def shown(notebook: NotebookNode) -> list[list[Image.Image]]:
    """The pictures of each strip, as they were drawn: strips repeat each pixel."""
    strips = []
    for output in outputs(notebook):
        if "image/png" in output.get("data", {}):
            strip = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
            side = strip.height
            pieces = [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side + GAP)]
            strips.append([piece.reduce(side // SIDE) for piece in pieces])
    return strips


def layout(picture: Image.Image) -> tuple:
    return seen(read(picture))


def described(words: str) -> tuple:
    """What a picture shows that these words describe."""
    scene = parse_layout(words + " background")
    assert scene is not None, words
    return seen(scene)


def is_bagel(picture: Image.Image, background: str) -> bool:
    """Whether it is orange around a hole of some other colour, on its background."""
    pixels = np.asarray(picture, dtype=float)
    middle, radius = SIDE // 2, round(0.2 * SIDE)

    def off(row: int, column: int, colour: str) -> float:
        return np.abs(pixels[row, column] - COLOURS[colour]).mean()

    around = [(middle + y * radius, middle + x * radius) for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    is_ring = all(off(*place, "orange") < 40 for place in around) and off(middle, middle, "orange") > 40
    return is_ring and all(off(row, column, background) < 40 for row in (2, -3) for column in (2, -3))


def check(notebook: NotebookNode) -> None:
    """Every word and picture of the lesson, by the reader of the world's pictures."""
    colour, plan, thinks, says, recoloured, learning, *steps = said(notebook)
    assert (colour, says.split(), recoloured) == ("green", ["says:", "star"], "green")
    assert re.fullmatch(r"362,496 of [\d,]+ parameters learn", learning)
    drawn, batch, edited, thought, forming, changed, before, samples, after, saved, *parts = shown(notebook)

    assert layout(drawn[0]) == described("a large red star in the middle on a white")
    (blue, orange) = read(batch[0]).things
    assert (blue.pair, orange.pair) == (("blue", "square"), ("orange", "circle"))
    assert read(batch[1]).things[0].pair == ("yellow", "triangle")
    assert layout(edited[1]) == described("a large green star in the middle on a white")
    planned = plan.removeprefix("<think>").removesuffix("</think>")
    assert layout(thought[0]) == seen(parse_layout(planned))
    assert parse_layout(thinks.removeprefix("thinks: ")).things[0].pair == ("yellow", "star")

    assert len(forming) == 7
    assert layout(forming[-1]) == described(
        "a large red star at the top and a small purple circle in the middle on a white"
    )
    assert {thing.pair for thing in read(changed[0]).things} == {("red", "star"), ("green", "circle")}

    assert not any(map(is_bagel, before, ("blue", "red")))
    assert all(map(is_bagel, after[:2], ("blue", "red")))
    assert layout(after[2]) == layout(samples[4]) == layout(drawn[0])
    # The adapter alone makes the difference.
    for left, right in zip(saved, before + after[:2], strict=True):
        assert np.array_equal(np.asarray(left), np.asarray(right))

    assert [words.split()[:2] for words in steps] == [["first", "a"], ["then", "add"], ["then", "add"]]
    assert [len(read(picture).things) for (picture,) in parts] == [1, 2, 3]


@pytest.mark.slow
def test_it_runs_without_the_network_and_shows_what_it_says(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check(run(stored()))


def test_what_is_stored_is_what_a_run_shows():
    notebook = stored()
    check(notebook)
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == list(
        range(1, 1 + len(sources(notebook, "code")))
    )


def test_nothing_of_the_machine_is_stored():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(?:home|root|work|tmp|usr|mnt|opt|Users)/|[A-Z]:\\\\|site-packages|0x[0-9a-f]{6}", text)
    assert all(output.output_type == "display_data" or output.name == "stdout" for output in outputs(stored()))
    metadata = stored().metadata
    assert metadata.keys() == {"kernelspec", "language_info"} and metadata.language_info == {"name": "python"}
    assert len(text) < 150_000


def test_links_lead_to_pages():
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(sources(stored(), "markdown")))
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


def test_another_model_is_one_variable(tmp_path, monkeypatch):
    """One in the layout that the 7B was published in, which knows nothing: it only has to go through."""
    for file in CHECKPOINT.iterdir():
        (tmp_path / file.name).symlink_to(file)
    load_processor().image_processor.save_pretrained(tmp_path)
    code = "\n".join(sources(stored(), "code"))
    for mine, other in (('MODEL = "shapes/checkpoint"', f"MODEL = {str(tmp_path)!r}"), ("STEPS = 150", "STEPS = 2")):
        assert code.count(mine) == 1
        code = code.replace(mine, other)
    monkeypatch.chdir(NOTEBOOK.parent)
    variables: dict = {"__name__": "lesson"}
    exec(compile(code, NOTEBOOK.name, "exec"), variables)
    assert isinstance(variables["pipe"], BagelPipeline)
    assert [picture.size for picture in variables["taught"]] == [variables["star"].size] * 2
