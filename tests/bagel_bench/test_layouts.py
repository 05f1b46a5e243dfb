"""The files that each benchmark's scorer opens, from prompts in the form in which the benchmark publishes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagel_bench import read_pictures
from tests.bagel_bench.conftest import (
    GENEVAL,
    pictures_of,
    write_image,
    write_json,
    write_lines,
)


def geneval(folder: Path) -> Path:
    return write_lines(folder / "evaluation_metadata.jsonl", GENEVAL)


def wise(folder: Path) -> Path:
    rows = [
        {"Prompt": "food of a festival", "prompt_id": 1, "Category": "Culture"},
        {"Prompt": "a game", "prompt_id": 7},
    ]
    return write_json(folder / "final_data.json", rows)


def dpg(folder: Path) -> Path:
    (folder / "prompts").mkdir()
    for name in ("0", "partiprompts9"):
        (folder / "prompts" / f"{name}.txt").write_text(f"a field of {name}\n")
    return folder / "prompts"


def gedit(folder: Path) -> Path:
    write_image(folder / "in" / "a.png")
    rows = [
        {
            "key": "1f3c",
            "task_type": "color_alter",
            "instruction": "make it red",
            "instruction_language": language,
            "input_image": "in/a.png",
        }
        for language in ("cn", "en")
    ]
    return write_lines(folder / "gedit.jsonl", rows)


def imgedit(folder: Path) -> Path:
    write_image(folder / "animal" / "000342021.jpg")
    row = {"id": "animal/000342021.jpg", "prompt": "make it red", "edit_type": "adjust"}
    return write_json(folder / "singleturn.json", {"1082": row, "673": row})


def kris(folder: Path) -> Path:
    for name in ("color_change/1.jpg", "multi-element_composition/1-1.jpg", "multi-element_composition/1-2.jpg"):
        write_image(folder / name)
    rows = [
        {"id": "1", "type": "color_change", "ori_img": "1.jpg", "ins_en": "make it red"},
        {"id": "1", "type": "multi-element_composition", "ori_img": ["1-1.jpg", "1-2.jpg"], "ins_en": "join them"},
    ]
    return write_json(folder / "final_data.json", rows)


def rise(folder: Path) -> Path:
    write_image(folder / "temporal_reasoning_images" / "1.png")
    row = {"index": "temporal_reasoning_1", "category": "temporal_reasoning", "instruction": "what it is later"}
    return write_json(folder / "data_total.json", [row | {"image": "temporal_reasoning_images/1.png"}])


SAMPLES = [f"samples/{sample:05}.png" for sample in range(4)]
LAYOUTS = {
    geneval: [f"{place}/{name}" for place in ("00000", "00001") for name in ("metadata.jsonl", *SAMPLES)],
    wise: ["1.png", "7.png"],
    dpg: ["0.png", "partiprompts9.png"],
    gedit: [f"fullset/color_alter/{where}/1f3c{end}.png" for where in ("cn", "en") for end in ("", "_SRCIMG")],
    imgedit: ["1082.png", "673.png"],
    kris: [f"{kind}/1.{end}" for kind in ("color_change", "multi-element_composition") for end in ("jpg", "png")],
    rise: ["temporal_reasoning/temporal_reasoning_1.png"],
}


@pytest.mark.parametrize("benchmark", LAYOUTS, ids=lambda write: write.__name__)
def test_a_run_writes_the_files_that_the_scorer_opens_and_no_others_there(benchmark, bench, tmp_path):
    code, printed, _ = bench(benchmark.__name__, benchmark(tmp_path))
    files = pictures_of(tmp_path / "out")
    assert code == 0 and list(files) == sorted(LAYOUTS[benchmark])
    for name in files:
        if not name.endswith(".jsonl"):
            Image.open(tmp_path / "out" / "images" / name).load()
    made = [name for name in files if name.endswith(".png") and "_SRCIMG" not in name]
    assert printed == f"{tmp_path / 'out' / 'images'}: {len(made)} pictures; see report.json\n"


def test_metadata_of_geneval_are_the_lines_of_the_prompt_file(bench, tmp_path):
    bench("geneval", geneval(tmp_path), "out", "--samples", "1")
    for number, row in enumerate(GENEVAL):
        text = (tmp_path / "out" / "images" / f"{number:05}" / "metadata.jsonl").read_text(encoding="utf-8")
        assert json.loads(text) == row


def test_dpg_bench_gets_four_drawings_in_two_rows(bench, tmp_path):
    prompts = dpg(tmp_path)
    bench("dpg", prompts)
    bench("dpg", prompts, "one", "--samples", "1")
    grid, one = (np.asarray(Image.open(tmp_path / out / "images" / "0.png")) for out in ("out", "one"))
    side = one.shape[0]
    assert grid.shape == (2 * side, 2 * side, 3)
    quarters = [grid[row : row + side, column : column + side] for row in (0, side) for column in (0, side)]
    assert np.array_equal(quarters[0], one)
    assert not any(np.array_equal(quarters[0], other) for other in quarters[1:])


def test_gedit_bench_gets_the_source_beside_the_edit(bench, tmp_path):
    bench("gedit", gedit(tmp_path))
    place = tmp_path / "out" / "images" / "fullset" / "color_alter" / "en"
    source, edit = (np.asarray(Image.open(place / f"1f3c{end}.png")) for end in ("_SRCIMG", ""))
    assert np.array_equal(source, np.asarray(Image.open(tmp_path / "in" / "a.png")))
    assert not np.array_equal(source, edit)


def test_kris_bench_gets_all_pictures_of_a_row_and_the_edit_as_jpeg_and_png(bench, tmp_path):
    pictures, _ = read_pictures("kris", kris(tmp_path))
    assert [[image.name for image in picture.images] for picture in pictures] == [["1.jpg"], ["1-1.jpg", "1-2.jpg"]]
    bench("kris", tmp_path / "final_data.json")
    place = tmp_path / "out" / "images" / "color_change"
    png, jpeg = (np.asarray(Image.open(place / name), dtype=int) for name in ("1.png", "1.jpg"))
    assert png.shape == jpeg.shape and abs(png - jpeg).mean() < 8


def test_kris_bench_is_read_from_its_own_folders_too(tmp_path):
    listed, _ = read_pictures("kris", kris(tmp_path / "data"))
    rows = {"1": {"ori_img": "1.jpg", "ins_en": "make it red"}}
    write_json(tmp_path / "data" / "color_change" / "annotation.json", rows)
    rows = {"1": {"ori_img": ["1-1.jpg", "1-2.jpg"], "ins_en": "join them"}}
    write_json(tmp_path / "data" / "multi-element_composition" / "annotation.json", rows)
    assert read_pictures("kris", tmp_path / "data") == (listed, {})


def test_dpg_bench_is_read_from_its_table_of_questions_too(tmp_path):
    (tmp_path / "dpg.csv").write_text(
        "item_id,text,proposition_id,question_natural_language\n"
        "0,a field of 0,1,Is there a field?\n0,a field of 0,2,Is it 0?\n"
        "partiprompts9,a field of partiprompts9,1,Is there a field?\n"
    )
    assert read_pictures("dpg", tmp_path / "dpg.csv") == read_pictures("dpg", dpg(tmp_path))


def test_pictures_to_edit_may_lie_in_another_folder(tmp_path):
    prompts = imgedit(tmp_path / "data")
    moved = prompts.rename(tmp_path / "singleturn.json")
    pictures, broken = read_pictures("imgedit", moved, tmp_path / "data")
    assert not broken and pictures[0].images == (tmp_path / "data" / "animal" / "000342021.jpg",)
    assert len(read_pictures("imgedit", moved)[1]) == 2
