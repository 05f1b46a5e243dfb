"""The plug-in of lmms-eval: how it is found, and what it answers to requests of the harness."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from world import render

from bagel_harnesses.answers import Answerer
from tests.harnesses.conftest import MODEL
from tests.harnesses.test_answers import ASKED, FEW, STAR, answerer, said


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lmms_eval(harnesses) -> Any:
    return harnesses("lmms_eval")


def requests(lmms_eval: Any, task: str, messages: list[list[dict]], settings: list[dict] | None = None) -> list[Any]:
    """Requests as the harness makes them for models of messages; documents are their own messages."""
    settings = settings or [{}] * len(messages)
    return [
        lmms_eval.Instance(
            request_type="generate_until",
            arguments=("", lambda document: document, settings[index], index, task, "test"),
            idx=0,
            metadata={"task": task, "doc_id": index, "repeats": 1},
        )
        for index in range(len(messages))
    ]


def answers(lmms_eval: Any, model: Any, messages: list[list[dict]], settings: list[dict] | None = None) -> list[str]:
    model.task_dict["shapes"] = {"test": messages}
    return model.generate_until(requests(lmms_eval, "shapes", messages, settings))


def asked(*parts: Any) -> list[dict]:
    """Messages of the harness, whose images are `url`s."""
    (message,) = said(*parts)
    content = [{"type": "image", "url": part["image"]} if "image" in part else part for part in message["content"]]
    return [{"role": "user", "content": content}]


def test_the_harness_finds_the_model_by_the_entry_point(harnesses):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["bagel_hf"].partition(":")
    harnesses("lmms_eval")
    manifest = getattr(importlib.import_module(module), name)()
    assert manifest.model_id == "bagel_hf"
    module, _, name = manifest.chat_class_path.rpartition(".")
    # Messages keep texts and images in their order.
    assert not getattr(importlib.import_module(module), name).is_simple


def test_questions_are_answered_in_their_order_whatever_their_settings(lmms_eval):
    model = lmms_eval.BagelHF(**MODEL, batch_size=3)
    messages = [asked(render(case.scene), case.question) for case in ASKED]
    settings = [{"max_new_tokens": length, "temperature": 0} for length in (64, 1, 64, 64)]
    ours = [answerer().answer([said(render(case.scene), case.question)], [0])[0].text for case in ASKED]
    theirs = answers(lmms_eval, model, messages, settings)
    assert [theirs[index] for index in (0, 2, 3)] == [ours[index] for index in (0, 2, 3)]
    assert theirs[1] == ours[1].split()[0]


def test_batches_hold_as_many_requests_as_asked_for(lmms_eval, monkeypatch):
    sizes, answer = [], Answerer.answer
    monkeypatch.setattr(Answerer, "answer", lambda self, *args: sizes.append(len(args[0])) or answer(self, *args))
    messages = [asked(render(ASKED[0].scene), ASKED[0].question)] * 5
    answers(lmms_eval, lmms_eval.BagelHF(**MODEL, batch_size="2"), messages)
    assert sizes == [2, 2, 1]


def test_a_drawing_is_a_file_whose_noise_follows_from_its_document(lmms_eval, tmp_path):
    model = lmms_eval.BagelHF(**MODEL, output="image", output_dir=str(tmp_path), seed=4, **FEW)
    one, other = map(json.loads, answers(lmms_eval, model, [asked(STAR), asked(STAR)]))
    assert one["images"] == [str(tmp_path / "shapes_0_0.png")] and other["images"] == [
        str(tmp_path / "shapes_1_0.png")
    ]
    ours = answerer("image", **FEW).answer([said(STAR)], [5])[0].images[0]
    assert Image.open(other["images"][0]).tobytes() == ours.tobytes() != Image.open(one["images"][0]).tobytes()


def test_a_system_message_in_words_is_read(lmms_eval):
    model = lmms_eval.BagelHF(**MODEL)
    system = {"role": "system", "content": "answer in one word"}
    question = said(render(ASKED[0].scene), ASKED[0].question)
    messages = [system, *asked(render(ASKED[0].scene), ASKED[0].question)]
    ours = answerer().answer(
        [[{"role": "system", "content": [{"type": "text", "text": "answer in one word"}]}, *question]], [0]
    )
    assert answers(lmms_eval, model, [messages]) == [ours[0].text]


def test_a_video_is_refused_by_its_kind(lmms_eval):
    with pytest.raises(ValueError, match="BAGEL reads texts and images, and the task has 'video'"):
        answers(
            lmms_eval, lmms_eval.BagelHF(**MODEL), [[{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]]
        )


@pytest.mark.parametrize(("size", "error"), [("auto", TypeError), (0, ValueError), ("0", ValueError)])
def test_a_batch_size_that_is_none_is_refused_before_anything_is_loaded(lmms_eval, size, error):
    with pytest.raises(error, match="`batch_size`"):
        lmms_eval.BagelHF("no/such-model", batch_size=size)
