"""What a session computes and keeps: each token once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from diffusers_bagel import BagelSession
from diffusers_bagel.contexts import BagelContext
from tests.conftest import golden_image
from tests.diffusers_bagel.conftest import seeded
from transformers_bagel.cache import GROWTH
from transformers_bagel.segments import EncodedSegment


DRAW = {"height": 48, "width": 64, "num_inference_steps": 2, "vae_sample_mode": "argmax"}
WORDS = {"output": "text", "max_new_tokens": 5}
# One token each, which the tokenizer would make of them, too.
LETTERS = (64, 65, 66)


@pytest.fixture
def tokens_read(pipe) -> Iterator[list[int]]:
    """How many tokens each forward read."""
    counts: list[int] = []

    def count(module, args, kwargs):
        if kwargs.get("input_ids") is not None:
            counts.append(kwargs["input_ids"].numel())

    hook = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    hook.remove()


def forced(*tokens: int):
    """Writes these tokens, again and again."""

    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = torch.full_like(scores, -torch.inf)
        scores[:, tokens[force.count % len(tokens)]] = 0.0
        force.count += 1
        return scores

    force.count = 0
    return force


def look(session: BagelSession, content, **settings) -> None:
    """A turn whose answer is cut off after five letters."""
    session.send(content, logits_processor=[forced(*LETTERS)], **WORDS | settings)


def length(segments: tuple[EncodedSegment, ...]) -> int:
    return sum(map(len, segments))


def own_tokens(context: BagelContext) -> int:
    """That no other context holds for it."""
    return context.held - (context.prefix.length if context.prefix else 0)


def kept_tokens(*sessions: BagelSession) -> int:
    """Tokens whose keys the first layer of all sessions keeps, in every tensor that is alive for them."""
    storages = {}

    def add(context) -> None:
        if context.prefix is not None:
            add(context.prefix)
        keys = context.cache.layers[0].keys
        storages[keys.untyped_storage().data_ptr()] = keys.untyped_storage().nbytes() // keys[0, :, 0].nbytes

    for session in sessions:
        for context in session._read._contexts:
            add(context)
    return sum(storages.values())


class TestReading:
    def test_a_turn_reads_what_is_new_with_the_token_that_starts_its_answer(self, pipe, tokens_read):
        session = BagelSession(pipe)
        look(session, [golden_image("wide"), "what is it?"])
        said = length(session._said.seen.full)
        tokens_read.clear()
        look(session, "and what else?")
        question = length(session._said.seen.full[-2:-1])
        # The text before was cut off: the last of its tokens and its end are read with the question.
        assert said > 5 * question
        assert tokens_read == [2 + question + 1, 1, 1, 1, 1]

    def test_a_text_that_was_written_is_not_read_again(self, pipe, tokens_read):
        end = pipe.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        session = BagelSession(pipe)
        session.send("a red circle", logits_processor=[forced(*LETTERS, end)], **WORDS)
        text = session._said.seen.full[-1]
        assert text.token_ids[1:].tolist() == [*LETTERS, end]
        tokens_read.clear()
        session.send("b", **WORDS | {"max_new_tokens": 1})
        assert tokens_read == [1 + length(session._said.seen.full[-2:-1]) + 1]

    def test_of_a_text_with_other_tokens_the_rest_is_read(self, pipe, tokens_read):
        tokenizer = pipe.processor.tokenizer
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        whole = tokenizer("a red circle")["input_ids"]
        # A word letter by letter, which the tokenizer would not do.
        letters = [tokenizer(letter)["input_ids"][0] for letter in "circle"]
        session, other = BagelSession(pipe), BagelSession(pipe)
        session.send("what is it?", logits_processor=[forced(*whole, *letters, end)], **WORDS | {"max_new_tokens": 20})
        text = session._said.seen.full[-1]
        same = 1 + len(whole)
        assert text.token_ids[:same].tolist()[1:] == whole
        assert text.token_ids.tolist()[1:] != [*whole, *letters, end]
        tokens_read.clear()
        reply = session.send("b", **WORDS)
        question = length(session._said.seen.full[-2:-1])
        assert tokens_read[0] <= len(text) - same + 1 + question + 1
        other.send("what is it?", **WORDS)
        other._said, other._read = session._turns[-1][1], type(session._read)()
        assert other.send("b", **WORDS).text == reply.text

    def test_a_picture_turn_reads_the_picture_before_and_its_own_text(self, pipe, tokens_read):
        session = BagelSession(pipe)
        session.send("a red circle", output="image", **DRAW)
        tokens_read.clear()
        session.send("now make it blue", output="image", **DRAW)
        text, *picture = session._said.drawn_from.full[:3]
        instruction = length(session._said.drawn_from.full[3:4])
        # The text alone behind the text before, for guidance, and all of it.
        assert tokens_read == [instruction, length(picture) + instruction]

    def test_a_fork_reads_what_is_said_to_it(self, pipe, tokens_read):
        session = BagelSession(pipe)
        look(session, [golden_image("wide"), "what is it?"])
        fork = session.fork()
        look(session, "and what else do you see?")
        tokens_read.clear()
        look(fork, "b")
        assert tokens_read == [2 + length(fork._said.seen.full[-2:-1]) + 1, 1, 1, 1, 1]

    def test_whoever_goes_back_reads_what_is_said_instead(self, pipe, tokens_read):
        session = BagelSession(pipe)
        look(session, [golden_image("wide"), "what is it?"])
        look(session, "and what else do you see?")
        session.back()
        tokens_read.clear()
        look(session, "b")
        assert tokens_read == [length(session._said.seen.full[-2:-1]) + 1, 1, 1, 1, 1]

    def test_looking_at_pictures_reads_them_once(self, pipe, tokens_read):
        session = BagelSession(pipe)
        session.send("a red circle", output="image", **DRAW)
        look(session, "what is it?")
        tokens_read.clear()
        look(session, "and now?")
        assert tokens_read[0] == 2 + length(session._said.seen.full[-2:-1]) + 1


class TestMemory:
    def test_ten_turns_that_draw_keep_each_token_once(self, pipe):
        session = BagelSession(pipe)
        text = "a large red circle left of a small blue square on a yellow ground"
        for _ in range(10):
            session.send(text, output="image", **DRAW)
            track = session._said.drawn_from
            # What the next turn goes on from: all but the last picture, and the texts without any.
            expected = length(track.full[:-2]) + length(track.no_image.own) - len(track.full[0])
            contexts = session._read._contexts
            assert sum(map(own_tokens, contexts)) == expected
            assert kept_tokens(session) <= expected + GROWTH * len(contexts)

    def test_looking_keeps_what_is_seen_behind_what_both_begin_with(self, pipe):
        """What is seen without latents has other keys and values behind the first picture, and the same before it."""
        session = BagelSession(pipe)
        session.send("a red circle " * 40, output="image", **DRAW)
        session.send("make it blue", output="image", **DRAW)
        session.send("what is it?", **WORDS)
        session.send("make it green", output="image", **DRAW)
        first = session._said.drawn_from.full[0]
        own = [
            length(segments) - len(first)
            for segments in (
                session._said.drawn_from.full[:-2],
                session._said.drawn_from.no_image.own,
                # Of the last turn, nothing was seen yet.
                session._said.seen.full[:-2],
            )
        ]
        # The last token of the text that was cut off, and its end, are read with what comes next.
        assert kept_tokens(session) <= len(first) + sum(own) - 2 + 3 * GROWTH
        assert sum(map(own_tokens, session._read._contexts)) == len(first) + sum(own) - 2

    def test_a_fork_copies_nothing(self, pipe):
        session = BagelSession(pipe)
        session.send([golden_image("wide"), "what is it?"], **WORDS)
        assert kept_tokens(session, session.fork()) == kept_tokens(session)

    def test_what_an_interrupted_text_has_read_is_not_kept(self, pipe):
        session = BagelSession(pipe)
        session.send("a", **WORDS)
        before = kept_tokens(session)
        for event in session.stream("b", output="text", max_new_tokens=GROWTH * 4, logits_processor=[forced(64)]):
            if event.type == "text":
                session.interrupt()
        assert kept_tokens(session) <= before + GROWTH


class TestPreviews:
    def test_each_decodes_once(self, pipe, monkeypatch):
        decoded = []
        decode = pipe.vae.decode
        monkeypatch.setattr(pipe.vae, "decode", lambda *args, **kwargs: decoded.append(1) or decode(*args, **kwargs))
        settings = DRAW | {"num_inference_steps": 6, "generator": seeded(0)}
        events = list(BagelSession(pipe).stream("a red circle", output="image", preview_every=2, **settings))
        previews = [event for event in events if event.type == "preview"]
        assert len(previews) == 2
        assert len(decoded) == len(previews) + 1
