"""What a session refuses or is interrupted in: it stands where it stood, or at the last whole part, and goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from diffusers_bagel import PROTOCOLS, BagelPipeline, BagelSession, send_all
from tests.conftest import golden_image, load_model
from tests.diffusers_bagel.conftest import seeded
from tests.diffusers_bagel.test_saved_sessions import SCRIPTS, assert_goes_on_alike, parts, said, says


DRAW = {"num_inference_steps": 3, "height": 48, "width": 64}
SHORT = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def session(own_pipe) -> BagelSession:
    """With a turn behind it."""
    session = BagelSession(own_pipe)
    session.send([golden_image("wide"), "what is it?"], output="text", **SHORT)
    return session


def with_limit(session: BagelSession, left: int) -> int:
    """Let the model know as many more positions than the conversation takes, and tell how many that are."""
    limit = session.contexts["full"].next_position + left
    session.pipe.transformer.config.text_config.max_position_embeddings = limit
    return limit


@contextmanager
def breaking_off(session: BagelSession, forwards: int) -> Iterator[None]:
    """All forwards behind the first so many fail in the second layer, for want of memory."""
    count = 0

    def fail(*args) -> None:
        nonlocal count
        count += 1
        if count > forwards:
            raise torch.OutOfMemoryError("no memory is left")

    hook = session.pipe.transformer.model.language_model.layers[1].register_forward_hook(fail)
    try:
        yield
    finally:
        hook.remove()


class TestModels:
    @pytest.mark.parametrize(
        ("needed", "protocol"), [("visual_und", None), ("visual_und", "zebra"), ("visual_gen", "zebra")]
    )
    def test_without_the_part_that_is_needed(self, needed, protocol, pipe):
        other = copy.copy(pipe)
        other.transformer = load_model(**{needed: False})
        with pytest.raises(ValueError, match=f"without `{needed}=True`"):
            BagelSession(other, protocol)

    def test_without_a_vae(self, pipe):
        other = copy.copy(pipe)
        other.vae = None
        with pytest.raises(ValueError, match="`pipe`.*no `vae`. Load it"):
            BagelSession(other)

    @pytest.mark.parametrize("protocol", [3, ["zebra"], {"name": "zebra"}])
    def test_a_protocol_that_is_none(self, protocol, pipe):
        with pytest.raises(TypeError, match="`protocol` must be a name or an `InterleaveProtocol`, got"):
            BagelSession(pipe, protocol)


class TestBeforeAnythingIsSaid:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"output": "video"}, "`output` must be one of auto, text, image, interleaved, got 'video'"),
            ({"output": ["text"]}, "`output` must be one of"),
            ({"output": "image", "latents": []}, "`latents` holds noise for 0 pictures, and one more is due. Pass"),
            (
                {"output": "image", "latents": torch.zeros(1, 3, 16)},
                r"`latents` must be .*\(1, 12, 16\).*\(1, 3, 16\)",
            ),
            ({"output": "image", "latents": torch.zeros(1, 12, 16).half()}, "`latents` must be float32"),
            ({"output": "image", "latents": [None]}, "`latents` must hold a tensor for each picture"),
            ({"output": "image", "latents": 3}, "`latents` must hold a tensor for each picture"),
        ],
        ids=str,
    )
    def test_arguments_that_cannot_work(self, arguments, message, session):
        before = said(session)
        with pytest.raises((TypeError, ValueError), match=message):
            session.send("draw it", **(DRAW | SHORT | arguments))
        assert said(session) == before
        assert session.send("draw it", output="image", generator=seeded(0), **DRAW).images

    @pytest.mark.parametrize("output", ["text", "image", "interleaved", "auto"])
    def test_an_image_where_the_protocol_takes_none(self, output, pipe):
        session = BagelSession(pipe, "sot")
        with pytest.raises(ValueError, match="`content` holds an image.*'sot'.*Leave it out, or choose another"):
            session.send([golden_image("wide"), "a chair"], output=output, **SHORT, **DRAW)
        assert session.messages == []
        assert session.send("a chair", output="text", **SHORT).content
        assert [name for name, protocol in PROTOCOLS.items() if not protocol.takes_images] == ["sot"]

    @pytest.mark.parametrize(
        ("output", "settings", "left", "needs"),
        [
            ("text", {"max_new_tokens": 20}, 24, 22),
            ("image", {}, 8, 2),
            ("image", {"think": True, "max_new_tokens": 20}, 130, 22),
            ("interleaved", {"max_new_tokens": 20}, 24, 22),
        ],
    )
    def test_positions_that_the_model_does_not_know(self, output, settings, left, needs, session):
        before, limit = said(session), with_limit(session, left)
        settings = {"do_sample": False, "output": output} | settings | DRAW
        with pytest.raises(ValueError, match=rf"{needs} rope positions.*knows {limit}.*: \d+ are left.*`back\(\)`"):
            session.send("and " * left, **settings)
        assert said(session) == before
        assert session.send("a", output="text", max_new_tokens=1).content


class TestInTheMiddle:
    def test_a_picture_for_which_no_position_is_left(self, session):
        session.protocol = PROTOCOLS["zebra"].with_changes(system_prompt=None)
        text = "a" * 8
        # The question with its marks, and the text, of which the end alone is left.
        limit = with_limit(session, 3 + 10 + 1)
        before = len(session.messages)
        with pytest.raises(
            ValueError, match=rf"A picture takes 2 rope positions.*knows {limit}.*: 1 are left.*`back\(\)`"
        ):
            session.send(
                "b",
                output="interleaved",
                max_new_tokens=8,
                logits_processor=says(session.pipe, f"{text}<|im_end|>"),
                do_sample=False,
                **DRAW,
            )
        assert [parts(message) for message in session.messages[before:]] == [["b"], [text]]
        session.back()
        assert session.send("a", output="text", max_new_tokens=1).content

    def test_noise_for_fewer_pictures_than_are_drawn(self, pipe):
        session = BagelSession(pipe, "zebra")
        noise = torch.randn(1, 12, 16, generator=seeded(0))
        with pytest.raises(ValueError, match="`latents` holds noise for 1 pictures, and one more is due. Pass"):
            session.send(
                "a chair",
                output="interleaved",
                max_new_tokens=20,
                logits_processor=says(pipe, "a<|im_end|>b<|im_end|>"),
                do_sample=False,
                latents=noise,
                **DRAW,
            )
        assert [part["type"] for part in session.messages[-1]["content"]] == ["text", "image", "text"]
        assert session.send("and now?", output="text", **SHORT).content

    @pytest.mark.parametrize("streams", [False, True])
    @pytest.mark.parametrize("where", ["reading", "text", "next token", "step", "decode", "encode"])
    def test_whatever_breaks_off_an_answer_leaves_its_whole_parts(self, where, streams, session, monkeypatch):
        """Such as Ctrl-C, in the middle of a forward: the caches that grew are used as far as they are whole."""
        pipe = session.pipe
        session.protocol = PROTOCOLS["canvas"]
        twin, before = session.fork(), len(session.messages)
        settings = {"output": "interleaved", "max_new_tokens": 30, "do_sample": False} | DRAW
        script = SCRIPTS["canvas"]
        places = {"reading": (0, []), "text": (3, []), "next token": (4, []), "step": (8, ["text"])}
        calls = []

        def break_off(*args, **kwargs):
            calls.append(args)
            if len(calls) > places.get(where, (0,))[0]:
                raise KeyboardInterrupt

        layers = pipe.transformer.model.language_model.layers
        with monkeypatch.context() as patch:
            if where in places:
                hook = layers[1].register_forward_hook(break_off)
            else:
                patch.setattr(pipe.vae, where, break_off)
            with pytest.raises(KeyboardInterrupt):
                answer = session.stream("draw", logits_processor=says(pipe, script), generator=seeded(4), **settings)
                if streams:
                    list(answer)
                else:
                    session.send("draw", logits_processor=says(pipe, script), generator=seeded(4), **settings)
            if where in places:
                hook.remove()
        kept = [part["type"] for message in session.messages[before + 1 :] for part in message["content"]]
        assert kept == places.get(where, (0, ["text"]))[1]
        assert session.fork().send("and now?", output="text", **SHORT).content
        session.back()
        for each in (session, twin):
            each.send("draw", logits_processor=says(pipe, script), generator=seeded(4), **settings)
        assert said(session) == said(twin)

    @pytest.mark.parametrize("where", ["text", "step", "decode"])
    def test_who_interrupts_gets_the_whole_parts(self, where, session, monkeypatch):
        session.protocol = PROTOCOLS["canvas"]
        before = len(session.messages)
        calls = []

        def interrupt(*args, **kwargs):
            calls.append(args)
            if len(calls) == {"text": 3, "step": 9, "decode": 1}[where]:
                session.interrupt()

        decode = BagelPipeline.decode_latents
        if where == "decode":
            monkeypatch.setattr(
                session.pipe, "decode_latents", lambda *args: (interrupt(), decode(session.pipe, *args))[1]
            )
            hook = None
        else:
            hook = session.pipe.transformer.model.language_model.layers[1].register_forward_hook(interrupt)
        reply = session.send(
            "draw",
            output="interleaved",
            max_new_tokens=30,
            do_sample=False,
            logits_processor=says(session.pipe, SCRIPTS["canvas"]),
            **DRAW,
        )
        if hook is not None:
            hook.remove()
        kept = [] if where == "text" else ["text"]
        assert [part["type"] for part in reply.content] == kept
        assert [part["type"] for message in session.messages[before + 1 :] for part in message["content"]] == kept
        assert session.send("and now?", output="text", **SHORT).content


class TestBehindATextThatWasNotReadToItsEnd:
    """Of a text that was cut off, the end is read with what comes next, into the same cache."""

    @pytest.fixture
    def session(self, own_pipe) -> BagelSession:
        session = BagelSession(own_pipe)
        session.send("a red circle", output="text", **SHORT)
        return session

    @pytest.mark.parametrize("goes_back", [False, True])
    @pytest.mark.parametrize("streams", [False, True])
    @pytest.mark.parametrize(("output", "forwards"), [("text", 0), ("text", 2), ("image", 0)])
    def test_a_forward_that_breaks_off(self, output, forwards, streams, goes_back, session, tmp_path):
        twin = BagelSession(session.pipe)
        twin.send("a red circle", output="text", **SHORT)
        settings = {"output": output, "generator": seeded(4)} | SHORT | DRAW
        with breaking_off(session, forwards), pytest.raises(torch.OutOfMemoryError):
            list(session.stream("b", **settings)) if streams else session.send("b", **settings)
        if goes_back:
            session.back()
            drawn = [
                each.send("b", **settings | {"output": "image", "generator": seeded(4)}).images[0]
                for each in (session, twin)
            ]
            # One of them has read the end of the text before in another forward.
            assert np.abs(np.asarray(drawn[0], int) - np.asarray(drawn[1], int)).max() <= 1
        session.save_pretrained(tmp_path)
        assert_goes_on_alike(session, BagelSession.from_pretrained(tmp_path, session.pipe))

    def test_a_forward_of_several_sessions_that_breaks_off(self, session, tmp_path):
        other = BagelSession(session.pipe)
        other.send("a red circle " * 40, output="text", **SHORT)
        turns = [(session, "b"), (other, "c " * 60)]
        with breaking_off(session, 1), pytest.raises(torch.OutOfMemoryError):
            send_all(turns, output="text", **SHORT)
        for index, (each, _) in enumerate(turns):
            each.save_pretrained(tmp_path / str(index))
            assert_goes_on_alike(each, BagelSession.from_pretrained(tmp_path / str(index), each.pipe))

    def test_whoever_forks_in_the_middle_of_a_forward(self, session, tmp_path):
        forks = []
        layers = session.pipe.transformer.model.language_model.layers
        hook = layers[1].register_forward_hook(lambda *args: forks.append(session.fork()))
        session.send("b", output="text", **SHORT)
        hook.remove()
        forks[0].save_pretrained(tmp_path)
        assert_goes_on_alike(forks[0], BagelSession.from_pretrained(tmp_path, session.pipe))


class TestForks:
    @pytest.mark.parametrize(("before", "turns"), [(0, 2), (1, 1)])
    def test_go_back_behind_what_two_contexts_begin_with(self, before, turns, own_pipe, tmp_path):
        session = BagelSession(own_pipe)
        session.send("a red circle", output="text", **SHORT)
        session.send([golden_image("wide"), "what is it?"], output="text", **SHORT)
        session.send("make it blue", output="image", generator=seeded(1), **DRAW)
        if before:
            session.back(before)
        fork = session.fork()
        for each in (fork, session):
            each.back(turns)
        fork.save_pretrained(tmp_path)
        assert_goes_on_alike(fork, BagelSession.from_pretrained(tmp_path, own_pipe))
        assert said(session) != said(fork)
