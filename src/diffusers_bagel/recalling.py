# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Conversations that were led elsewhere, taken over by a session as if it had led them itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from transformers_bagel.segments import EncodedSegment, check_conversation, content_parts

from .answering import PLAN, REFLECTION, Answer
from .conversation import SaidImage, SaidText


if TYPE_CHECKING:
    from .session import BagelSession


@dataclass(frozen=True)
class Turn:
    """
    What was said and answered.

    Attributes:
        given, answer (`tuple[dict, ...]`):
            Parts of messages, `{"type": "text", "text": ...}` or `{"type": "image", "image": ...}`.
    """

    given: tuple[dict[str, Any], ...]
    answer: tuple[dict[str, Any], ...] = ()

    @property
    def thought(self) -> str | None:
        """For what the model was asked to think before it answered, `"text"` or `"image"`, if its answer holds thoughts."""
        texts = [part["text"] for part in self.answer if part["type"] == "text"]
        if not any("<think>" in text for text in texts):
            return None
        is_plan = [part["type"] for part in self.answer] == ["text", "image"] and texts[0].endswith("</think>")
        return "image" if is_plan else "text"


def turns_of(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """
    The turns of a conversation. A turn ends where somebody else speaks after the assistant; a segment knows no roles, so that
    all others are one.

    Raises:
        TypeError, ValueError: if the messages are none, see [`check_conversation`].
    """
    check_conversation(messages, "messages")
    turns: list[Turn] = []
    for message in messages:
        parts = tuple(content_parts(message))
        is_answer = message["role"] == "assistant"
        if not turns or (turns[-1].answer and not is_answer):
            turns.append(Turn(()))
        last = turns[-1]
        turns[-1] = Turn(last.given, (*last.answer, *parts)) if is_answer else Turn((*last.given, *parts))
    return turns


def recall(session: BagelSession, turns: Sequence[Turn], sanitize_control_tokens: bool) -> None:
    """Let a session take over turns. No model is asked; the next answer reads them."""
    for turn in turns:
        answer = _answer(session, turn, sanitize_control_tokens)
        answer.listen({"role": "user", "content": list(turn.given)}, turn.thought == "image")
        session._begin_turn(answer.message, answer.said)
        for part, said in zip(turn.answer, _answered(answer, turn), strict=True):
            if isinstance(said, SaidText):
                answer.said = answer.said.with_text(said)
            else:
                answer.said = answer.said.with_image(said)
            answer._finish(**part)


def _answer(session: BagelSession, turn: Turn, sanitize_control_tokens: bool) -> Answer:
    # Some protocols always ask for thoughts.
    think = None if turn.thought is None else True
    return Answer(session, session._settings({"sanitize_control_tokens": sanitize_control_tokens, "think": think}))


def _answered(answer: Answer, turn: Turn) -> Iterator[SaidText | SaidImage]:
    """What is said by an answer."""
    protocol, before = answer.protocol, None
    for part in turn.answer:
        text, is_behind_picture = part.get("text"), before == "image"
        before = part["type"]
        if text is None:
            yield answer._shown_as(part["image"])
        elif is_behind_picture and text == protocol.reflection:
            yield SaidText(answer.reader.encode_text(text)[0], REFLECTION)
        else:
            sanitize = answer.settings.sanitize_control_tokens
            update = PLAN if turn.thought == "image" else protocol.written
            is_untagged = protocol.written.no_text == "untagged"
            untagged = protocol.untagged(text) if is_untagged else None
            yield SaidText(
                answer.reader.encode_text(text, sanitize)[0],
                update,
                None if untagged is None else answer.reader.encode_text(untagged, sanitize)[0],
                is_written=True,
            )


def is_as_recalled(session: BagelSession, turn: Turn, sanitize_control_tokens: bool = False) -> bool:
    """
    Whether a session, in its last turn, said what it would recall of it: then it answers like one that has recalled it.

    Not so is an answer that holds special tokens, one without the thoughts that it was asked for, or one that a protocol has
    cleaned.
    """
    answer = _answer(session, turn, sanitize_control_tokens)
    _, answer.said = session._turns[-1]
    answer.listen({"role": "user", "content": list(turn.given)}, turn.thought == "image")
    said, recalled = session._said.turns[-1], [*answer.said.turns[-1], *_answered(answer, turn)]
    return len(said) == len(recalled) and all(map(_is_alike, said, recalled))


def _is_alike(one: SaidText | SaidImage, other: SaidText | SaidImage) -> bool:
    """Whether two that say the same words, or show the same image, do so in the same way."""
    if isinstance(one, SaidText) and isinstance(other, SaidText):
        texts = _have_same_tokens(one.segment, other.segment) and _have_same_tokens(one.untagged, other.untagged)
        return texts and (one.update, one.is_written) == (other.update, other.is_written)
    if not (isinstance(one, SaidImage) and isinstance(other, SaidImage) and _way(one) == _way(other)):
        return False
    # Resized for the ViT from what the VAE gets, or from the original, an image can have the same size.
    return torch.equal(one.vae.pixels, other.vae.pixels) and torch.equal(one.vit.pixels, other.vit.pixels)


def _way(image: SaidImage) -> tuple[object, ...]:
    """How an image is shown: a setting may have given it another size."""
    return image.vae.grid, image.vit.grid, image.update, image.encoders, image.is_given, image.is_resized


def _have_same_tokens(one: EncodedSegment | None, other: EncodedSegment | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.token_ids, other.token_ids)


def _is_answer(said: SaidText | SaidImage) -> bool:
    return said.is_written if isinstance(said, SaidText) else not said.is_given


def kept_bytes(session: BagelSession) -> int:
    """What a session keeps in memory: keys and values, images and what was made of them."""
    tensors = list(session._read.tensors())
    images = {id(said): said for turn in session._said.turns for said in turn if isinstance(said, SaidImage)}
    for said in images.values():
        tensors += [
            tensor for each in (said.vae, said.vit) for tensor in (each.pixels, each.latents) if tensor is not None
        ]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    pictures = (
        part["image"] for message in session.messages for part in message["content"] if part["type"] == "image"
    )
    return sum(storages.values()) + sum(3 * image.width * image.height for image in pictures)


def count_tokens(session: BagelSession, output: str) -> int:
    """Tokens of all that was said, as the model reads them for an answer in texts, or for one with pictures."""
    track = session._said.seen if output == "text" else session._said.drawn_from
    return sum(map(len, track.full))


@dataclass(frozen=True)
class TurnTokens:
    """
    Tokens of a session's last turn.

    Attributes:
        prompt, prompt_images (`int`): That the model reads before it answers, and those of them that are of images.
        drawn (`int`): Of the pictures of the answer.
    """

    prompt: int
    prompt_images: int
    drawn: int


def tokens_of_turn(session: BagelSession, output: str) -> TurnTokens:
    """How many tokens the last turn took."""
    segments = session._said.seen.full if output == "text" else session._said.drawn_from.full
    last = session._said.turns[-1]
    answered = next((place for place, said in enumerate(last) if _is_answer(said)), len(last))
    images = [said for said in last[answered:] if isinstance(said, SaidImage)]
    own = {id(said.segment) for said in last[answered:] if isinstance(said, SaidText)}
    own |= {id(segment) for said in images for segment in (said.vae, said.vit)}
    prompt = [segment for segment in segments if id(segment) not in own]
    sizes = [said.vae.segment.content.size for said in images]
    return TurnTokens(
        sum(map(len, prompt)),
        sum(len(segment) for segment in prompt if segment.grid is not None),
        # As it was drawn; read back, it may have another size.
        sum(size[0] * size[1] // session.pipe.vae_scale_factor**2 for size in sizes),
    )
