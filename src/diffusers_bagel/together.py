# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Several sessions that answer at once: what all of them ask the model for is done together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from transformers_bagel.errors import shown

from .answering import SessionEvent
from .session import BagelReply, BagelSession
from .streamers import ended
from .work import KINDS, Running, groups, results


@torch.no_grad()
def send_all(
    turns: Sequence[tuple[BagelSession, Any]], output: str | Sequence[str] = "auto", **settings: Any
) -> list[BagelReply]:
    """
    Say something to each of several sessions, and get all answers, each the one that its session would give alone.

    The texts of all are written in one batch, and the steps of their pictures share forwards.

    Args:
        turns (`Sequence[tuple[BagelSession, Any]]`): Sessions of one pipeline, and what is said to each.
        output (`str` or `Sequence[str]`, *optional*, defaults to `"auto"`): Of all, or one for each.
        settings:
            As of [`BagelSession.send`], of all. `generator`, `latents` and `logits_processor` may be a list of what each
            session would take alone.

    Returns:
        `list[BagelReply]`: In the order of the sessions.

    Raises:
        TypeError, ValueError: for arguments that cannot work, before anything is said.
        Exception:
            the first error of a session's answer, after the others have answered. What was whole stays in each session.
    """
    with ended(settings.get("streamer")):
        return _sent(list(turns), output, settings)


def _sent(
    turns: list[tuple[BagelSession, Any]], output: str | Sequence[str], settings: dict[str, Any]
) -> list[BagelReply]:
    _check_turns(turns)
    outputs = _of_each("output", output, len(turns), isinstance(output, str))
    own = _settings_of_each(settings, len(turns))
    running: list[Running] = []
    replies: list[BagelReply | None] = [None] * len(turns)
    try:
        for place, ((session, content), chosen, given) in enumerate(zip(turns, outputs, own, strict=True)):
            steps = session._steps(content, chosen, given, shows_bar=not place)
            running.append(Running(steps, functools.partial(_keep_reply, replies, place)))
        for each in running:
            each.go_on()
        while kinds := {type(each.work) for each in running if each.work is not None}:
            for group in groups(running, min(kinds, key=KINDS.index)):
                for (each, _), result in zip(group, results([work for _, work in group]), strict=True):
                    each.go_on(result)
    finally:
        for each in running:
            each.steps.close()
        turns[0][0].pipe.maybe_free_model_hooks()
    for place, each in enumerate(running):
        if each.error is not None:
            each.error.add_note(f"The answer of session {place} of `turns`.")
            raise each.error
    return [reply for reply in replies if reply is not None]


def _keep_reply(replies: list[BagelReply | None], place: int, event: SessionEvent) -> None:
    replies[place] = event.reply


def _check_turns(turns: Sequence[Any]) -> None:
    for turn in turns:
        if not isinstance(turn, (tuple, list)) or len(turn) != 2 or not isinstance(turn[0], BagelSession):
            raise TypeError(f"`turns` must be pairs of a `BagelSession` and what is said to it, got {shown(turn)}.")
    if not turns:
        raise ValueError("`turns` is empty. Pass a session and what is said to it, at least once.")
    sessions = [session for session, _ in turns]
    if len({id(session) for session in sessions}) < len(sessions):
        raise ValueError("`turns` has a session twice, but it can answer one thing at a time. Pass a `fork()` of it.")
    if any(session.pipe is not sessions[0].pipe for session in sessions):
        raise ValueError(
            "`turns` has sessions of several pipelines, which cannot compute together. Call `send_all` for each pipeline."
        )


def _settings_of_each(settings: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The settings of each session alone."""
    for name in ("preview_every", "streamer"):
        if settings.get(name) is not None:
            raise ValueError(f"`{name}`: `send_all` gives out whole answers only. Leave it out, or use `stream`.")
    given = dict(settings)
    own = {}
    for name in ("generator", "latents", "logits_processor"):
        if (value := given.pop(name, None)) is not None:
            is_of_all = isinstance(value, torch.Generator)
            if name == "logits_processor":
                is_of_all = not any(item is None or isinstance(item, (list, tuple)) for item in value)
            own[name] = _of_each(name, value, count, is_of_all)
    return [given | {name: values[index] for name, values in own.items()} for index in range(count)]


def _of_each(name: str, value: Any, count: int, is_of_all: bool) -> list[Any]:
    if is_of_all:
        return [value] * count
    if not isinstance(value, (list, tuple)) or len(value) != count:
        given = len(value) if isinstance(value, (list, tuple)) else shown(value)
        raise ValueError(f"`{name}` must hold one value for each of {count} sessions, got {given}.")
    return list(value)
