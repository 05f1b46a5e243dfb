"""Several sessions in one batch: each answers what it would alone, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from diffusers_bagel import BagelPipeline, BagelReply, BagelSession, send_all
from diffusers_bagel.work import Decoding
from tests.conftest import golden_image, load_processor, max_error
from tests.diffusers_bagel.conftest import TEXTS, seeded


SIZE = {"height": 48, "width": 64}
DRAW = SIZE | {"num_inference_steps": 3, "vae_sample_mode": "argmax"}
SAMPLE = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8}


@pytest.fixture
def latents(monkeypatch) -> list[list[torch.Tensor]]:
    """Latents of the pictures that were drawn, those that were decoded at a time together."""
    drawn: list[list[torch.Tensor]] = []
    together = Decoding.together

    def watched(works: Sequence[Decoding]) -> list[np.ndarray]:
        drawn.append([work.latents for work in works])
        return together(works)

    monkeypatch.setattr(Decoding, "together", staticmethod(watched))
    return drawn


def sessions_of(pipe: BagelPipeline, protocol: str | None = None) -> list[BagelSession]:
    """Of unequal length: nothing said, a text, an image and a text, a picture and a text."""
    sessions = [BagelSession(pipe, protocol) for _ in range(4)]
    sessions[1].send("what is it?", output="text", max_new_tokens=5)
    sessions[2].send([golden_image("wide"), "what is it?"], output="text", max_new_tokens=3, vae_sample_mode="argmax")
    sessions[3].send("a blue square", output="image", latents=[noise(0)], **DRAW)
    return sessions


def noise(seed: int) -> torch.Tensor:
    return torch.randn(12, 16, generator=seeded(seed))


def parts(reply: BagelReply) -> list:
    return [part.get("text") if part["type"] == "text" else part["image"].size for part in reply.content]


def assert_equal(together: Sequence[BagelReply], alone: Sequence[BagelReply]) -> None:
    for one, other in zip(together, alone, strict=True):
        assert parts(one) == parts(other)
        for picture, expected in zip(one.images, other.images, strict=True):
            assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1


def assert_as_alone(
    make: Callable[[], list[BagelSession]], contents: Sequence, each: Sequence[dict], **common
) -> None:
    """Two turns of each session, together and alone. The settings of each are lists of all."""
    names = {name for own in each for name in own}
    alone, together = make(), make()
    for _ in range(2):
        expected = [
            session.send(content, **{name: make_value() for name, make_value in own.items()}, **common)
            for session, content, own in zip(alone, contents, each, strict=True)
        ]
        lists = {name: [own[name]() for own in each] for name in names}
        assert_equal(send_all(list(zip(together, contents, strict=True)), **lists, **common), expected)
    for one, other in zip(together, alone, strict=True):
        assert [message["role"] for message in one.messages] == [message["role"] for message in other.messages]
        lengths = [
            {name: (context.length, context.next_position) for name, context in session.contexts.items()}
            for session in (one, other)
        ]
        assert lengths[0] == lengths[1]


class TestResults:
    def test_texts(self, pipe):
        assert_as_alone(lambda: sessions_of(pipe), TEXTS, [{}] * 4, output="text", max_new_tokens=12)

    def test_texts_are_written_in_one_batch(self, pipe, forwards):
        sessions = sessions_of(pipe)
        seen = forwards(pipe)
        send_all(list(zip(sessions, TEXTS, strict=True)), output="text", max_new_tokens=4)
        assert [len(call["input_ids"]) for call in seen.reading[-3:]] == [4, 4, 4]

    def test_sampled_texts_follow_their_own_generators(self, pipe):
        each = [{"generator": lambda seed=seed: seeded(seed)} for seed in range(4)]
        assert_as_alone(lambda: sessions_of(pipe), ["a"] * 4, each, output="text", **SAMPLE)
        state = torch.get_rng_state()
        replies = send_all(
            [(BagelSession(pipe), "a") for _ in range(2)], output="text", generator=seeded(1, 2), **SAMPLE
        )
        assert replies[0].text != replies[1].text
        assert torch.equal(torch.get_rng_state(), state)

    def test_texts_of_sessions_whose_protocols_set_other_limits(self, pipe):
        """Sampled and greedy ones, short and long ones."""

        def make() -> list[BagelSession]:
            plain = BagelSession(pipe).protocol
            settings = [{"max_new_tokens": 3}, {"max_new_tokens": 9}, SAMPLE, SAMPLE | {"temperature": 0.5}]
            return [BagelSession(pipe, plain.with_changes(settings=own)) for own in settings]

        each = [{"generator": lambda seed=seed: seeded(seed)} for seed in range(4)]
        assert_as_alone(make, TEXTS, each, output="text")

    def test_a_text_that_ends_before_the_others(self, pipe):
        end = pipe.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")

        def ends_after(count: int, prompt: int):
            def ended(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                forced = torch.full_like(scores, -torch.inf)
                forced[:, end if ids.shape[1] - prompt >= count else 64] = 0.0
                return forced

            return ended

        # Each sees its own tokens only.
        prompts = [len(pipe.processor.tokenizer(text)["input_ids"]) + 3 for text in TEXTS]
        each = [
            {"logits_processor": lambda count=count, prompt=prompt: [ends_after(count, prompt)]}
            for count, prompt in zip((2, 7, 0, 3), prompts, strict=True)
        ]
        sessions = [BagelSession(pipe) for _ in TEXTS]
        replies = send_all(
            list(zip(sessions, TEXTS, strict=True)),
            output="text",
            logits_processor=[own["logits_processor"]() for own in each],
            max_new_tokens=9,
        )
        word = pipe.processor.tokenizer.decode([64])
        assert [reply.text for reply in replies] == [word * count for count in (2, 7, 0, 3)]
        expected = [
            session.send("b", output="text", max_new_tokens=5) for session in (other.fork() for other in sessions)
        ]
        assert_equal(send_all([(session, "b") for session in sessions], output="text", max_new_tokens=5), expected)

    def test_pictures(self, pipe):
        each = [{"latents": lambda seed=seed: [noise(seed)]} for seed in range(4)]
        assert_as_alone(lambda: sessions_of(pipe), TEXTS, each, output="image", **DRAW)

    def test_pictures_that_share_forwards_are_those_of_their_own(self, pipe, latents, forwards):
        """Sizes and contexts differ, some have images to be guided by."""
        own_size = {name: value for name, value in DRAW.items() if name not in SIZE}
        contents = [[golden_image(name), "make it green"] for name in ("wide", "square", "tall")]
        alone = [
            BagelSession(pipe).send(content, output="image", generator=seeded(seed), **own_size)
            for seed, content in enumerate(contents)
        ]
        singles = [drawn[0] for drawn in latents]
        latents.clear()
        seen = forwards(pipe)
        turns = [(BagelSession(pipe), content) for content in contents]
        together = send_all(turns, output="image", generator=seeded(0, 1, 2), **own_size)
        assert_equal(together, alone)
        assert seen.branches == [9, 9, 9]
        for (one,), single in zip(latents, singles, strict=True):
            assert max_error(one, single) <= 5e-4

    def test_no_more_pictures_than_fit_are_decoded_at_a_time(self, pipe, latents, monkeypatch):
        monkeypatch.setattr("diffusers_bagel.work.MAX_VAE_TOKENS", 2 * 12)
        send_all([(BagelSession(pipe), "a") for _ in range(5)], output="image", **DRAW)
        assert [len(together) for together in latents] == [2, 2, 1]

    @pytest.mark.parametrize("protocol", ["zebra", "canvas", "cooper", None])
    def test_answers_in_texts_and_pictures(self, protocol, pipe):
        def make() -> list[BagelSession]:
            return [BagelSession(pipe, protocol) for _ in range(3)]

        contents = ["a red circle", [golden_image("square"), "and now?"], "two small yellow squares"]
        each = [{"generator": lambda seed=seed: seeded(seed)} for seed in range(3)]
        settings = {"max_images": 2, "max_new_tokens": 5, "do_sample": True, "temperature": 2.0}
        assert_as_alone(make, contents, each, output="interleaved" if protocol else "auto", **settings, **DRAW)

    def test_each_answers_in_its_own_kind(self, pipe):
        each = [
            {"output": lambda kind=kind: kind, "generator": lambda seed=seed: seeded(seed)}
            for seed, kind in enumerate(("text", "image", "auto", "image"))
        ]
        assert_as_alone(lambda: sessions_of(pipe), TEXTS, each, max_new_tokens=4, think=True, max_images=1, **DRAW)


class TestFailures:
    def test_an_error_of_one_is_raised_when_the_others_have_answered(self, pipe):
        def fails(ids, scores):
            if ids.shape[1] > 8:
                raise RuntimeError("mine")
            return scores

        sessions = [BagelSession(pipe) for _ in range(3)]
        expected = BagelSession(pipe).send("a", output="text", max_new_tokens=9).text
        with pytest.raises(RuntimeError, match="mine") as caught:
            send_all(
                [(session, "a") for session in sessions],
                output="text",
                logits_processor=[None, [fails], None],
                max_new_tokens=9,
            )
        assert "session 1" in "".join(caught.value.__notes__)
        assert [session.messages[-1]["role"] for session in sessions] == ["assistant", "user", "assistant"]
        assert sessions[2].messages[-1]["content"] == [{"type": "text", "text": expected}]
        other = BagelSession(pipe)
        other.send("a", output="text", max_new_tokens=9)
        assert sessions[0].send("b", output="text", max_new_tokens=4) == other.send(
            "b", output="text", max_new_tokens=4
        )
        sessions[1].back()
        assert sessions[1].send("a", output="text", max_new_tokens=9).text == expected

    def test_a_picture_that_cannot_be_drawn_leaves_the_others(self, pipe):
        noises = [[noise(0)], [torch.full((12, 16), torch.nan)], [noise(2)]]
        sessions = [BagelSession(pipe) for _ in noises]
        with pytest.raises(ValueError, match="NaN"):
            send_all([(session, "a") for session in sessions], output="image", latents=noises, **DRAW)
        assert [session.messages[-1]["role"] for session in sessions] == ["assistant", "user", "assistant"]
        expected = BagelSession(pipe).send("a", output="image", latents=[noise(2)], **DRAW)
        assert_equal([BagelReply(sessions[2].messages[-1]["content"])], [expected])

    def test_one_that_is_interrupted_leaves_the_others(self, pipe):
        sessions = [BagelSession(pipe) for _ in range(3)]

        def interrupts(ids, scores):
            sessions[1].interrupt()
            return scores

        replies = send_all(
            [(session, "a") for session in sessions],
            output="text",
            logits_processor=[None, [interrupts], None],
            max_new_tokens=6,
        )
        alone = BagelSession(pipe).send("a", output="text", max_new_tokens=6)
        assert_equal(replies, [alone, BagelReply([]), alone])
        assert sessions[1].send("b", output="text", max_new_tokens=6).content

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"turns": []}, "`turns` is empty"),
            ({"turns": ["a"]}, "`turns` must be pairs"),
            ({"output": ["text"]}, "`output` must hold one value for each of 2"),
            ({"output": "video"}, "`output`"),
            ({"generator": seeded(0, 1, 2)}, "`generator`"),
            ({"latents": [noise(0)]}, "`latents`"),
            ({"preview_every": 2}, "`preview_every`"),
        ],
        ids=lambda value: str(value)[:24],
    )
    def test_arguments_that_cannot_work(self, change, message, pipe):
        sessions = [BagelSession(pipe) for _ in range(2)]
        arguments = {"turns": [(session, "a") for session in sessions], "output": "image"} | DRAW | change
        with pytest.raises((TypeError, ValueError), match=message):
            send_all(**arguments)
        assert [session.messages for session in sessions] == [[], []]

    def test_a_session_that_comes_twice(self, pipe):
        session = BagelSession(pipe)
        with pytest.raises(ValueError, match="twice"):
            send_all([(session, "a"), (session, "b")], output="text")

    def test_sessions_of_two_pipelines(self, pipe):
        other = BagelPipeline(**(pipe.components | {"processor": load_processor()}))
        with pytest.raises(ValueError, match="several pipelines"):
            send_all([(BagelSession(pipe), "a"), (BagelSession(other), "b")], output="text")
