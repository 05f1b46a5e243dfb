"""What is wrong with prompts, folders and settings is told in one sentence, before the model is loaded."""

from __future__ import annotations

import json

import pytest
from filelock import FileLock
from PIL import Image

from bagel_bench import read_pictures
from bagel_bench.folder import RunFolder, differences
from diffusers_bagel import BagelPipeline
from tests.bagel_bench.conftest import GENEVAL, pictures_of, records_of, write_image, write_json, write_lines


@pytest.fixture
def unloaded(monkeypatch):
    """The model must not be needed."""
    monkeypatch.setattr(BagelPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))


WISE = {"Prompt": "a game", "prompt_id": 1}
EDIT = {"index": "1", "category": "causal", "instruction": "later", "image": "in.png"}
# A benchmark, a row, and what is wrong with it.
BROKEN = [
    ("geneval", '{"prompt": "a cat"', "it is no JSON (Expecting ',' delimiter"),
    ("geneval", "", "it is no JSON"),
    ("geneval", ["a cat"], "it must be an object with fields, got ['a cat']"),
    ("geneval", {"tag": "colors"}, "the field `prompt` is missing"),
    ("geneval", {"prompt": " "}, "`prompt` must be a text, got ' '"),
    ("geneval", {"prompt": 3}, "`prompt` must be a text, got 3"),
    ("geneval", '{"prompt": "a cat", "prompt": "a dog"}', "the field `prompt` stands twice"),
    ("wise", WISE | {"prompt_id": "../1"}, "`prompt_id` must be the name of a file, got '../1'"),
    ("wise", WISE | {"prompt_id": ".."}, "`prompt_id` must be the name of a file, got '..'"),
    ("wise", WISE | {"prompt_id": None}, "`prompt_id` must be the name of a file, got None"),
    ("rise", EDIT | {"image": "gone.png"}, "gone.png' is not there"),
    ("rise", EDIT | {"image": "text.png"}, "text.png' cannot be read (cannot identify image file"),
    ("rise", EDIT | {"image": []}, "`image` must name a picture, or several, got []"),
]


@pytest.mark.parametrize(("benchmark", "row", "sentence"), BROKEN)
@pytest.mark.usefixtures("unloaded")
def test_a_broken_row_stops_the_run_and_is_named(benchmark, row, sentence, bench, tmp_path):
    write_image(tmp_path / "in.png")
    (tmp_path / "text.png").write_text("no picture")
    whole = {"geneval": GENEVAL[0], "wise": WISE, "rise": EDIT}[benchmark]
    prompts = write_lines(tmp_path / "prompts.jsonl", [whole, row])
    code, printed, told = bench(benchmark, prompts)
    assert code == 2 and printed == "" and not (tmp_path / "out").exists()
    assert told.startswith(f"error: '{prompts}', line 2, is broken: ") and sentence in told
    assert told.endswith("'--on-error skip' leaves them out.\n")


def test_broken_rows_are_left_out_if_that_was_asked_for_and_drawn_once_they_are_mended(bench, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [GENEVAL[0], "{", GENEVAL[1]])
    code, printed, _ = bench("geneval", prompts, "out", "--samples", "1", "--on-error", "skip")
    assert code == 0 and "2 pictures, 1 left out" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["skipped"]) == ["line 2"] and "no JSON" in report["skipped"]["line 2"]
    before = pictures_of(tmp_path / "out")
    # The others keep their numbers.
    assert {name.split("/")[0] for name in before} == {"00000", "00002"}
    write_lines(prompts, [GENEVAL[0], {"prompt": "a dog"}, GENEVAL[1]])
    code, printed, _ = bench("geneval", prompts, "out", "--samples", "1")
    assert code == 0 and "3 pictures;" in printed
    assert before.items() < pictures_of(tmp_path / "out").items() and len(records_of(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("benchmark", "name", "text", "where", "first"),
    [
        ("wise", "a.jsonl", json.dumps(WISE) + "\n" + json.dumps(WISE | {"Prompt": "food"}), "line 2", "line 1"),
        ("wise", "a.json", json.dumps([WISE, WISE]), "row 2", "row 1"),
        ("dpg", "a.csv", "item_id,text\n1,a cat\n1,a dog\n", "line 3", "line 2"),
        (
            "imgedit",
            "a.json",
            '{"7": {"id": "in.png", "prompt": "x"}, "7": {"id": "in.png", "prompt": "y"}}',
            "key '7'",
            "key '7'",
        ),
    ],
)
def test_a_double_id_is_named_and_only_its_first_row_is_drawn(benchmark, name, text, where, first, tmp_path):
    write_image(tmp_path / "in.png")
    (tmp_path / name).write_text(text)
    pictures, broken = read_pictures(benchmark, tmp_path / name)
    assert len(pictures) == 1 and broken == {where: f"it has the id of {first}."}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("gone.jsonl", None, "No such file"),
        ("a.txt", b"a cat", "must be a folder, or end in one of .jsonl, .json, .csv"),
        ("a.json", b"{", "is no JSON"),
        ("a.json", b"3", "must hold a list of rows or an object of them, got 3"),
        ("a.json", b"[]", "holds no prompts"),
        ("a.jsonl", b"", "holds no prompts"),
        ("a.jsonl", b"\xff", "is not UTF-8"),
        ("folder", None, "holds no prompts"),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_what_is_no_prompt_file_is_refused(name, content, sentence, bench, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    elif name == "folder":
        (tmp_path / name).mkdir()
    code, _, told = bench("geneval", tmp_path / name)
    assert code == 2 and told.startswith("error: --prompts cannot be read: ") and sentence in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bench", "coco"], "invalid choice: 'coco' (choose from 'geneval', 'wise'"),
        (["--preset", "geneva"], "argument --preset: invalid choice: 'geneva' (choose from"),
        (["--preset", "vqa"], "argument --preset: invalid choice: 'vqa' (choose from"),
        (["--batch-size", "0"], "argument --batch-size: must be a whole number from 1, got '0'"),
        (["--samples", "none"], "argument --samples: must be a whole number from 1, got 'none'"),
        (["--on-error", "ask"], "argument --on-error: invalid choice: 'ask'"),
        (["--model", "./gone"], "'./gone' is no folder"),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_arguments_that_cannot_be_are_refused(arguments, sentence, bench, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", GENEVAL)
    benchmark = arguments.pop() if arguments[0] == "bench" else "geneval"
    code, _, told = bench(benchmark, prompts, "out", *(arguments if benchmark == "geneval" else []))
    assert code == 2 and told.startswith("error: ") and sentence in told and not (tmp_path / "out").exists()


@pytest.fixture
def drawn(bench, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", GENEVAL)
    assert bench("geneval", prompts, "out", "--samples", "1")[0] == 0
    return prompts


def test_the_folder_of_another_run_is_refused_with_the_difference(drawn, bench, tmp_path, unloaded):
    before = pictures_of(tmp_path / "out")
    for arguments, sentence in (
        (("--samples", "1", "--steps", "3"), "`settings.num_inference_steps` is 2 there, and 3 here"),
        (("--samples", "1", "--preset", "demo"), "`settings.preset` is 'geneval' there, and 'demo' here"),
        (("--samples", "1", "--seed", "5"), "`seed` is 0 there, and 5 here"),
        (("--samples", "1", "--dtype", "bfloat16"), "`dtype` is 'float32' there, and 'bfloat16' here"),
        (("--samples", "2"), "`samples` is 1 there, and 2 here"),
    ):
        code, _, told = bench("geneval", drawn, "out", *arguments)
        assert code == 2 and "is of a run with other settings: " in told and sentence in told
    assert pictures_of(tmp_path / "out") == before


def test_a_folder_with_pictures_of_other_prompts_is_refused(drawn, bench, tmp_path, unloaded):
    other = write_lines(tmp_path / "other.jsonl", [GENEVAL[0], GENEVAL[1] | {"prompt": "a cat"}])
    told = bench("geneval", other, "out", "--samples", "1")[2]
    assert "'00001/samples/00000.png' was drawn of 'a blue stär', not of 'a cat'." in told
    fewer = write_lines(tmp_path / "fewer.jsonl", GENEVAL[:1])
    told = bench("geneval", fewer, "out", "--samples", "1")[2]
    assert "has the picture '00001/samples/00000.png', which these prompts do not ask for." in told


def test_prompts_may_be_added(drawn, bench, tmp_path):
    more = write_lines(tmp_path / "more.jsonl", [*GENEVAL, {"prompt": "a cat"}])
    code, printed, _ = bench("geneval", more, "out", "--samples", "1")
    assert code == 0 and "3 pictures" in printed and len(records_of(tmp_path / "out")) == 3


@pytest.mark.usefixtures("unloaded")
def test_folders_that_are_something_else_or_in_use_are_refused(bench, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", GENEVAL)
    assert "is a file: name a folder." in bench("geneval", prompts, "prompts.jsonl")[2]
    write_image(tmp_path / "mine" / "cat.png")
    assert "holds no run, but other files: name a new folder." in bench("geneval", prompts, "mine")[2]
    (tmp_path / "busy" / ".partial").mkdir(parents=True)
    with FileLock(tmp_path / "busy" / ".lock-0"):
        assert "is being written by another run: wait for it, or end it." in bench("geneval", prompts, "busy")[2]


def test_settings_that_drew_nothing_bind_nobody(tmp_path):
    for steps in (2, 3):
        with RunFolder(tmp_path / "out").opened({"steps": steps}):
            pass
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == {"steps": 3}


def test_differences_are_named_at_any_depth():
    assert differences({"a": 1, "b": {"c": [1], "d": 2}}, {"a": 1, "b": {"c": [2]}, "e": None}) == [
        "`b.c` is [1] there, and [2] here",
        "`b.d` is 2 there, and None here",
    ]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_picture_that_turns_out_to_be_cut_off_is_named(on_error, bench, tmp_path):
    whole = write_image(tmp_path / "in.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    rows = [EDIT, EDIT | {"index": "2", "image": "cut.png"}, EDIT | {"index": "3"}]
    code, printed, told = bench("rise", write_json(tmp_path / "rise.json", rows), "out", "--on-error", on_error)
    if on_error == "stop":
        assert code == 2 and f"'causal/2.png' cannot be drawn: the picture '{tmp_path / 'cut.png'}'" in told
        assert not (tmp_path / "out" / "report.json").exists()
    else:
        assert code == 0 and "2 pictures, 1 left out" in printed
        skipped = json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]
        assert list(skipped) == ["causal/2.png"]
    assert "causal/2.png" not in pictures_of(tmp_path / "out")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    folder = RunFolder(tmp_path / "out")

    def fail(path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with folder.opened({}), pytest.raises(OSError, match="No space"):
        folder.write("1.png", fail)
    assert pictures_of(tmp_path / "out") == {} and not any((tmp_path / "out" / ".partial").iterdir())


def test_a_full_disk_ends_the_run_and_leaves_no_half_of_a_picture(bench, tmp_path, monkeypatch):
    def fail(self, file, *args, **kwargs):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    prompts = write_lines(tmp_path / "prompts.jsonl", GENEVAL)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        code, _, told = bench("geneval", prompts, "out", "--samples", "1", "--on-error", "skip")
    assert code == 2 and "No space left on device" in told
    assert not [name for name in pictures_of(tmp_path / "out") if name.endswith(".png")]
    assert bench("geneval", prompts, "out", "--samples", "1")[0] == 0
