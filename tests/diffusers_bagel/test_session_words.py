"""Habits of transformers' users in sessions: streamers, stopping criteria, thoughts apart from words."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import (
    MaxLengthCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import BaseStreamer

from diffusers_bagel import BagelSession, InterleaveProtocol
from transformers_bagel.segments import END


DRAW = {"num_inference_steps": 2, "height": 48, "width": 64}
TAGGED = InterleaveProtocol("tagged", trigger="<draw>", stop="done")
TEXTS = ["<think>red is warm</think>here <draw>", "it is done"]


class Script:
    """Forces texts, one after the other."""

    def __init__(self, pipe, *texts: str):
        tokens = [pipe.processor.tokenizer(text + END)["input_ids"] for text in texts]
        self.tokens = iter(sum(tokens, []))

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.tokens)] = 0.0
        return forced


class Recorder(BaseStreamer):
    """What a streamer is told."""

    def __init__(self):
        self.told: list = []

    def put(self, value: torch.Tensor) -> None:
        self.told.append(tuple(value.shape))

    def end(self) -> None:
        self.told.append("end")


def said_by(pipe, *texts: str, **settings) -> dict:
    return {"output": "interleaved", "logits_processor": [Script(pipe, *texts)]} | DRAW | settings


def answered(session: BagelSession, way: str, content: str, **settings) -> None:
    if way == "send":
        session.send(content, **settings)
    else:
        list(session.stream(content, **settings))


def never_ends(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    forced = torch.full_like(scores, -torch.inf)
    forced[:, 64] = 0.0
    return forced


class TestStreamers:
    @pytest.mark.parametrize("way", ["send", "stream"])
    def test_all_texts_come_as_one(self, way, pipe):
        streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answered(BagelSession(pipe, TAGGED), way, "a red circle", streamer=streamer, **said_by(pipe, *TEXTS))
        assert "".join(streamer) == "".join(TEXTS)

    def test_events_and_a_streamer_have_the_same_words(self, pipe):
        streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        events = BagelSession(pipe, TAGGED).stream("a red circle", streamer=streamer, **said_by(pipe, *TEXTS))
        words = [event.text or "" for event in events]
        assert "".join(words) == "".join(streamer) == "".join(TEXTS)

    def test_a_streamer_may_be_used_again(self, pipe):
        streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        session = BagelSession(pipe, TAGGED)
        for text in ("one is done", "two is done"):
            session.send("a red circle", streamer=streamer, **said_by(pipe, text))
            assert "".join(streamer) == text

    def test_one_is_told_the_prompt_once_and_ends_once(self, pipe):
        streamer = Recorder()
        BagelSession(pipe, TAGGED).send("a red circle", streamer=streamer, **said_by(pipe, *TEXTS))
        prompt, *tokens, last = streamer.told
        assert len(prompt) == 2 and prompt[1] > 1
        assert set(tokens) == {(1,)} and last == "end"
        assert len(tokens) == sum(len(pipe.processor.tokenizer(text + END)["input_ids"]) for text in TEXTS)

    def test_words_are_printed_as_they_come(self, pipe, capsys):
        streamer = TextStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        BagelSession(pipe).send("hi", streamer=streamer, **said_by(pipe, "two circles", output="text"))
        assert capsys.readouterr().out == "two circles\n"

    def test_another_thread_reads_it(self, pipe):
        streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings = said_by(pipe, "two circles", output="text", streamer=streamer)
        thread = threading.Thread(target=BagelSession(pipe).send, args=["hi"], kwargs=settings)
        thread.start()
        assert "".join(streamer) == "two circles"
        thread.join()

    def test_a_picture_alone_ends_it(self, pipe):
        streamer = Recorder()
        BagelSession(pipe).send("a red circle", output="image", streamer=streamer, **DRAW)
        assert streamer.told == ["end"]

    @pytest.mark.parametrize("way", ["send", "stream"])
    @pytest.mark.parametrize(
        "wrong", [{"output": "video"}, {"steps": 3}, {"latents": []}, {"max_new_tokens": 10**6}], ids=str
    )
    def test_one_ends_when_the_answer_fails(self, wrong, way, pipe):
        streamer = Recorder()
        with pytest.raises((TypeError, ValueError)):
            answered(BagelSession(pipe, TAGGED), way, "a", streamer=streamer, **said_by(pipe, *TEXTS, **wrong))
        assert streamer.told.count("end") == 1 and streamer.told[-1] == "end"

    def test_one_ends_when_the_answer_is_interrupted(self, pipe):
        streamer, session = Recorder(), BagelSession(pipe)
        for event in session.stream("a b c", output="text", max_new_tokens=200, streamer=streamer):
            if event.type == "text":
                session.interrupt()
        assert streamer.told.count("end") == 1 and streamer.told[-1] == "end"

    def test_one_ends_when_nobody_listens_any_longer(self, pipe):
        streamer = Recorder()
        events = BagelSession(pipe).stream("a b c", output="text", max_new_tokens=200, streamer=streamer)
        next(events)
        events.close()
        assert streamer.told.count("end") == 1 and streamer.told[-1] == "end"

    @pytest.mark.parametrize("way", ["send", "stream"])
    def test_its_errors_are_raised(self, way, pipe):
        streamer = TextIteratorStreamer(pipe.processor.tokenizer)
        streamer.put = lambda value: 1 / 0
        with pytest.raises(ZeroDivisionError):
            answered(BagelSession(pipe), way, "a", output="text", max_new_tokens=2, streamer=streamer)
        assert "".join(streamer) == ""


class TestStoppingCriteria:
    @pytest.mark.parametrize("way", ["send", "stream"])
    @pytest.mark.parametrize("kind", [list, StoppingCriteriaList])
    def test_one_cuts_off_a_text_as_its_limit_does(self, kind, way, pipe):
        cut, limited = BagelSession(pipe), BagelSession(pipe)
        settings = {"output": "text", "logits_processor": [never_ends]}
        prompt = len(pipe.processor.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=True)[0]) + 1

        def after_three(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.full(ids.shape[:1], ids.shape[1] >= prompt + 3)

        answered(cut, way, "a b", stopping_criteria=kind([after_three]), **settings)
        limited.send("a b", max_new_tokens=3, **settings)
        assert cut.messages == limited.messages
        lengths = [session.contexts["full"].length for session in (cut, limited)]
        assert lengths[0] == lengths[1]

    def test_one_of_the_libraries_own(self, pipe):
        prompt = len(pipe.processor.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=True)[0]) + 1
        stopping = [MaxLengthCriteria(prompt + 3)]
        settings = {"output": "text", "logits_processor": [never_ends]}
        reply = BagelSession(pipe).send("a b", stopping_criteria=stopping, **settings)
        assert reply.content == BagelSession(pipe).send("a b", max_new_tokens=3, **settings).content

    @pytest.mark.parametrize("strings", ["circles", ["triangle", "circles"]], ids=str)
    def test_words_that_end_a_text(self, strings, pipe):
        said = said_by(pipe, "two circles and more", output="text")
        assert BagelSession(pipe).send("a", stop_strings=strings, **said).text == "two circles"

    def test_it_cuts_off_each_text(self, pipe):
        said = said_by(pipe, "one <draw> two", "three <draw> four", max_images=2)
        said["logits_processor"] = [Cut(pipe, "one <draw>", "three <draw>")]
        reply = BagelSession(pipe, TAGGED).send("a", stop_strings="<draw>", **said)
        assert [part.get("text") for part in reply.content] == ["one <draw>", None, "three <draw>", None]


class Cut(Script):
    """Texts that never say that they end."""

    def __init__(self, pipe, *texts: str):
        self.tokens = iter(sum((pipe.processor.tokenizer(text)["input_ids"] for text in texts), []))


class TestReplies:
    def test_thoughts_words_and_pictures_are_apart(self, pipe):
        reply = BagelSession(pipe, TAGGED).send("a red circle", **said_by(pipe, *TEXTS))
        image = reply.images[0]
        assert reply.thinking == "red is warm"
        assert reply.text == "here <draw>it is done"
        assert reply.message == {
            "role": "assistant",
            "reasoning_content": "red is warm",
            "content": [
                {"type": "text", "text": "here <draw>"},
                {"type": "image", "image": image},
                {"type": "text", "text": "it is done"},
            ],
        }
        assert [part.get("text") for part in reply.content] == [TEXTS[0], None, TEXTS[1]]

    def test_a_plan_is_a_thought(self, pipe):
        reply = BagelSession(pipe).send("a", **said_by(pipe, "<think>red</think>", output="image", think=True))
        assert (reply.thinking, reply.text) == ("red", "")
        assert [part["type"] for part in reply.message["content"]] == ["image"]

    @pytest.mark.parametrize("text", ["two circles", " two  circles ", "<think>I count</think>two", "<think>I cou"])
    def test_a_text_is_what_parse_response_makes_of_it(self, text, pipe):
        reply = BagelSession(pipe).send("a", **said_by(pipe, text, output="text"))
        assert reply.message == pipe.processor.parse_response(text)
        assert reply.text == reply.message["content"]
        assert reply.thinking == reply.message.get("reasoning_content", "")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"streamer": 3}, TypeError, "`streamer`"),
        ({"streamer": "words"}, TypeError, "`streamer`"),
        ({"stopping_criteria": never_ends}, TypeError, "`stopping_criteria` must be a list"),
        ({"stopping_criteria": [3]}, TypeError, "`stopping_criteria`"),
        ({"stop_strings": 3}, TypeError, "`stop_strings`"),
        ({"stop_strings": [""]}, TypeError, "`stop_strings`"),
        ({"stop_strings": []}, TypeError, "`stop_strings`"),
        ({"logits_processor": never_ends}, TypeError, "`logits_processor` must be a list"),
        ({"logits_processor": ["x"]}, TypeError, "`logits_processor`"),
        ({"top_p": 0.9}, TypeError, "top_p: no setting.*`logits_processor`"),
        ({"repetition_penalty": 1.1, "top_k": 5}, TypeError, "repetition_penalty, top_k: no setting"),
    ],
)
def test_what_cannot_work_is_refused_by_name(arguments, error, message, pipe):
    session = BagelSession(pipe)
    with pytest.raises(error, match=message):
        session.send("a", output="text", **arguments)
    assert session.messages == []


def test_what_generate_does_to_scores_is_a_logits_processor(pipe):
    settings = {"output": "text", "max_new_tokens": 6, "do_sample": True}
    cold = [TemperatureLogitsWarper(1e-4)]
    sampled = BagelSession(pipe).send("a", temperature=1.0, logits_processor=cold, **settings)
    assert sampled.content == BagelSession(pipe).send("a", **settings | {"do_sample": False}).content


def test_a_text_may_be_as_long_as_the_contract_says(pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer.config.text_config, "max_position_embeddings", 1024)
    with pytest.raises(ValueError, match="`max_new_tokens` 1024"):
        BagelSession(pipe).send("a", output="text")
