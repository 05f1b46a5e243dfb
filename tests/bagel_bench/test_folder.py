# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a run's folder keeps through prompts with unusual characters and through crashes."""

import json
from pathlib import Path

import pytest

from bagel_bench.benchmarks import Picture
from bagel_bench.folder import RunFolder, content_hash
from bagel_bench.rows import read_rows


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_character_that_some_take_for_the_end_of_a_line_stays_in_its_row_and_record(tmp_path, separator):
    prompt = f"a blue{separator}square"
    RunFolder(tmp_path).record(file="0.png", prompt=prompt)
    assert RunFolder(tmp_path).records() == [{"file": "0.png", "prompt": prompt}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row.fields for row in read_rows(prompts)] == [{"prompt": prompt}]


@pytest.mark.parametrize("torn", ['{"file": "1.png", "pro', '{"file": "1.png", "prompt": "\u00e9'])
def test_a_record_that_a_crash_cut_off_takes_no_other_with_it(tmp_path, torn):
    folder = RunFolder(tmp_path)
    folder.record(file="0.png", prompt="a")
    with (tmp_path / "records-0.jsonl").open("ab") as stream:
        stream.write(torn.encode()[:-1])
    folder.record(file="2.png", prompt="c")
    assert [record["file"] for record in folder.records()] == ["0.png", "2.png"]


def test_a_picture_whose_record_a_crash_prevented_keeps_other_settings_out(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.opened({"steps": 2}):
        folder.write("0.png", lambda file: file.write_bytes(b"drawn"))
    with pytest.raises(ValueError, match="`steps` is 2 there, and 5 here"), RunFolder(tmp_path).opened({"steps": 5}):
        pass


@pytest.fixture
def edited(tmp_path) -> tuple[RunFolder, Path]:
    """A run that has edited a source picture."""
    source = tmp_path / "source.png"
    source.write_bytes(b"one")
    folder = RunFolder(tmp_path / "run")
    with folder.opened({}):
        folder.record(file="0.png", prompt="a", sources=[content_hash(source)])
    return folder, source


def test_other_source_pictures_under_the_same_names_are_refused(edited):
    folder, source = edited
    picture = Picture("0.png", "a", ("0",), (source,))
    folder.check_pictures([picture])
    source.write_bytes(b"other")
    with pytest.raises(ValueError, match="'0.png' was made of another picture than '.*source.png' is now"):
        folder.check_pictures([picture])


def test_a_source_more_or_less_is_another_picture(edited):
    folder, source = edited
    folder.record(file="1.png", prompt="a")
    for picture, counts in [
        (Picture("0.png", "a", ("0",), ()), "1 pictures, and now 0"),
        (Picture("0.png", "a", ("0",), (source, source)), "1 pictures, and now 2"),
        (Picture("1.png", "a", ("1",), (source,)), "0 pictures, and now 1"),
    ]:
        with pytest.raises(ValueError, match=counts):
            folder.check_pictures([picture])


def test_a_process_that_comes_later_does_not_change_what_another_is_at(tmp_path):
    one, two = RunFolder(tmp_path, 0), RunFolder(tmp_path, 1)
    with one.opened({"seed": 1}):
        with pytest.raises(ValueError, match="`seed` is 1 there, and 2 here"), two.opened({"seed": 2}):
            pass
        with (
            two.opened({"seed": 1}),
            pytest.raises(ValueError, match="by another run"),
            RunFolder(tmp_path).opened({}),
        ):
            pass
    # Nobody is at it, and nothing was drawn.
    with two.opened({"seed": 2}), one.opened({"seed": 2}):
        pass
