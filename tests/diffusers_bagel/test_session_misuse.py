"""What users do that a session does not expect: it says so by name, or does what they mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_bagel import BagelPipeline, BagelSession, send_all
from tests.conftest import golden_image


SHORT = {"output": "text", "max_new_tokens": 3}
DRAW = {"num_inference_steps": 3, "height": 48, "width": 64, "vae_sample_mode": "argmax"}


@pytest.fixture
def session(pipe) -> BagelSession:
    """With a turn behind it."""
    session = BagelSession(pipe)
    session.send("what is it?", **SHORT)
    return session


class Heard:
    """A streamer that knows whether it was ended."""

    def __init__(self):
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("second", ["send", "back", "send_all"])
def test_one_answer_at_a_time(second, session):
    """In the middle of an answer another one, and going back, are refused; the answer goes on as if nothing had been."""
    expected = session.fork().send("and this?", **SHORT).content
    answer = session.stream("and this?", **SHORT)
    next(answer)
    with pytest.raises(RuntimeError, match=r"is answering.*fork"):
        if second == "send":
            session.send("more", **SHORT)
        elif second == "back":
            session.back()
        else:
            send_all([(session, "more")], **SHORT)
    *_, done = answer
    assert done.reply.content == expected
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2
    session.back(2)
    assert session.messages == []


def test_an_answer_that_nobody_takes_to_its_end_is_over(session):
    answer = session.stream("and this?", **SHORT)
    next(answer)
    answer.close()
    assert session.send("more", **SHORT).content


def test_interrupted_while_an_image_is_read(session, monkeypatch):
    """The VAE encodes what the user shows before anything is said."""
    encode = BagelPipeline.encode_images

    def interrupting(pipe, *args, **kwargs):
        session.interrupt()
        return encode(pipe, *args, **kwargs)

    monkeypatch.setattr(BagelPipeline, "encode_images", interrupting)
    assert session.send([golden_image("wide"), "what is it?"], **SHORT).content == []
    monkeypatch.undo()
    assert session.send("and now?", **SHORT).content


def test_looking_at_the_contexts_keeps_no_graph(pipe):
    session = BagelSession(pipe)
    session.send("a red circle", output="image", **DRAW)
    session._read.forget_all_but([])
    assert not session.contexts["full"].cache.layers[0].keys.requires_grad


@pytest.mark.parametrize("output", ["text", "auto", "image"])
def test_nothing_at_all(output, pipe, session):
    with pytest.raises(ValueError, match="`content` is empty, and nothing was said before"):
        BagelSession(pipe).send([], output=output)
    # Behind something it means: go on.
    assert session.send([], **SHORT).content


@pytest.mark.parametrize(
    ("content", "settings", "kind", "message"),
    [
        (3, {}, TypeError, "`content` must be a text, an image, or a list of them, got 3"),
        (b"x", {}, TypeError, "`content` must be a text"),
        (None, {}, TypeError, "`content` must be a text"),
        ("x", {"generator": 3}, TypeError, r"`generator` must be a `torch.Generator`, got 3"),
        ("x", {"streams": True}, TypeError, "streams: no setting of a session"),
    ],
)
def test_arguments_that_cannot_work(content, settings, kind, message, session):
    with pytest.raises(kind, match=message):
        session.send(content, **SHORT, **settings)
    assert len(session.messages) == 2


def test_nothing_to_go_back_to(pipe):
    with pytest.raises(ValueError, match="`turns`: there is none to forget"):
        BagelSession(pipe).back()


def test_sigmas_of_numpy(pipe):
    sessions = [BagelSession(pipe) for _ in range(2)]
    sigmas = np.array([1.0, 0.5])
    size = {"height": 48, "width": 64}
    replies = send_all([(session, "a red circle") for session in sessions], "image", sigmas=sigmas, **size)
    assert [reply.images[0].size for reply in replies] == [(64, 48)] * 2


def test_noise_of_one_picture(pipe):
    """A tensor alone is that of the one picture, here and for each session of several."""
    noise = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    alone = BagelSession(pipe).send("a red circle", output="image", latents=noise, **DRAW).images[0]
    turns = [(BagelSession(pipe), "a red circle") for _ in range(2)]
    for reply in send_all(turns, "image", latents=[noise, noise], **DRAW):
        difference = np.abs(np.array(reply.images[0], dtype=int) - np.array(alone, dtype=int))
        assert difference.max() <= 1


def test_a_refused_streamer_is_ended(session):
    streamer = Heard()
    with pytest.raises(ValueError, match="`streamer`: `send_all` gives out whole answers only"):
        send_all([(session, "more")], streamer=streamer, **SHORT)
    assert streamer.ends == 1


def test_words_that_are_streamed_are_computed_as_others_are(pipe):
    """Autocast is a thread's own."""
    kept = []
    for streams in (False, True):
        session = BagelSession(pipe)
        with torch.autocast("cpu", torch.bfloat16):
            answer = session.stream("what is it?", **SHORT) if streams else [session.send("what is it?", **SHORT)]
            assert list(answer)
        kept.append({context.cache.layers[0].values.dtype for context in session._read._contexts})
    assert kept == [{torch.bfloat16}] * 2
