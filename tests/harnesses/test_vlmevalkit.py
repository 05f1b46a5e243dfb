"""The class for VLMEvalKit: what it answers to the kit's messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from world import render

from tests.harnesses.conftest import MODEL
from tests.harnesses.test_answers import ASKED, FEW, STAR, answerer, said


@pytest.fixture(scope="module")
def vlmevalkit(harnesses) -> Any:
    return harnesses("vlmevalkit")


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "asked.png"
    render(ASKED[0].scene).save(path)
    return str(path)


def model(vlmevalkit: Any, **settings: Any) -> Any:
    given = dict(MODEL)
    return vlmevalkit.BagelHF(given.pop("pretrained"), **given, **settings)


def test_a_question_about_a_picture_is_answered_in_words(vlmevalkit, picture):
    message = [{"type": "image", "value": picture}, {"type": "text", "value": ASKED[0].question}]
    ours = answerer().answer([said(render(ASKED[0].scene), ASKED[0].question)], [0])
    assert model(vlmevalkit).generate(message, "MMBench") == ours[0].text


def test_a_conversation_is_answered_at_its_end(vlmevalkit, picture):
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "value": picture}, {"type": "text", "value": ASKED[0].question}],
        },
        {"role": "assistant", "content": [{"type": "text", "value": ASKED[0].answer}]},
        {"role": "user", "content": [{"type": "text", "value": "how many things are there?"}]},
    ]
    conversation = [*said(render(ASKED[0].scene), ASKED[0].question)]
    conversation += [{"role": "assistant", "content": [{"type": "text", "text": ASKED[0].answer}]}]
    conversation += said("how many things are there?")
    assert model(vlmevalkit).chat(turns, "MMDU") == answerer().answer([conversation], [0])[0].text


def test_prompts_of_words_are_the_kits_own(vlmevalkit):
    assert not model(vlmevalkit).use_custom_prompt("MMBench")


def test_a_drawing_is_the_name_of_a_file_and_its_noise_follows_from_the_index(vlmevalkit, tmp_path):
    artist = model(vlmevalkit, output="image", output_dir=str(tmp_path), **FEW)
    assert artist.use_custom_prompt("drawings")
    file = artist.generate(artist.build_prompt({"index": 6, "question": STAR}, "drawings"), "drawings")
    assert file == str(tmp_path / "drawings_6_0.png")
    ours = answerer("image", **FEW).answer([said(STAR)], [6])[0].images[0]
    assert Image.open(file).tobytes() == ours.tobytes()


def test_an_edit_gets_the_pictures_of_its_line(vlmevalkit, picture, tmp_path):
    artist = model(vlmevalkit, output="image", output_dir=str(tmp_path), **FEW)
    artist.set_dump_image(lambda line: [line["image_path"]])
    line = {"index": 0, "question": "make the background red", "image_path": picture}
    file = artist.generate(artist.build_prompt(line, "edits"), "edits")
    ours = answerer("image", **FEW).answer([said(render(ASKED[0].scene), "make the background red")], [0])
    assert Image.open(file).tobytes() == ours[0].images[0].tobytes()


def test_without_an_index_different_questions_are_different_files(vlmevalkit, tmp_path):
    artist = model(vlmevalkit, output="image", output_dir=str(tmp_path), **FEW)
    files = [artist.generate([{"type": "text", "value": text}], "forced") for text in (STAR, STAR, "a blue circle")]
    assert files[0] == files[1] != files[2]


def test_words_and_pictures_in_turn_are_a_line_of_json(vlmevalkit, tmp_path):
    teller = model(vlmevalkit, output="interleaved", output_dir=str(tmp_path), max_images=1, max_new_tokens=16, **FEW)
    line = teller.generate(teller.build_prompt({"index": 2, "question": f"show the steps: {STAR}"}, "steps"), "steps")
    assert "\n" not in line and all(Path(file).is_file() for file in json.loads(line)["images"])


def test_a_video_is_refused_by_its_kind(vlmevalkit):
    with pytest.raises(ValueError, match="BAGEL reads texts and images, and the data set has 'video'"):
        model(vlmevalkit).generate([{"type": "video", "value": "a.mp4"}], "Video-MME")
