# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What the page shows, as HTML. Gradio's own chat shows no picture's alternative text, and has no buttons at each picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

import PIL.Image
from gradio.route_utils import API_PREFIX
from markdown_it import MarkdownIt

from .talk import Drawing, Picture, Turn, Words


# What somebody uploaded, or the model wrote, loads nothing from elsewhere.
_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).disable(["image", "link", "autolink"])
_PREVIEW_SIDE = 512


@dataclass(frozen=True)
class Example:
    """Something to begin with."""

    text: str
    output: str
    think: bool = False
    shown: tuple[Path, ...] = ()


# `bagel draw "a large yellow star in the middle and a small red circle at the top left on a blue background"` by bagel-shapes.
SHOWN = Path(__file__).with_name("example.png")
EXAMPLES = (
    Example("a large red circle in the middle on a white background", "Picture"),
    Example("something with five points in the colour of a lemon on blue", "Picture", think=True),
    Example("a large yellow star and a small blue square on white then tell me how many things are there?", "Auto"),
    Example("show the steps: a red circle at the top and a blue star at the left on yellow", "Auto"),
    Example("what colour is the star?", "Words", shown=(SHOWN,)),
)


def split_thought(text: str) -> tuple[str, str]:
    """Thoughts and words of a text, which may end anywhere."""
    before, opened, rest = text.partition("<think>")
    thought, _, after = rest.partition("</think>")
    return thought.strip(), (before + after).strip() if opened else text.strip()


def conversation(turns: Sequence[Turn], is_answering: bool = False) -> str:
    """Everything that was said; of the last turn without its answer, if that is in the making."""
    if not turns:
        return _beginning()
    shown = [_turn(turn, "" if is_answering and turn is turns[-1] else answer(turn)) for turn in turns]
    if not is_answering:
        shown.append('<button type="button" class="again" data-act="again">Run again</button>')
    return "".join(shown)


def answer(turn: Turn) -> str:
    """The answer of a turn, whole or in the making."""
    parts = "".join(_part(part) for part in turn.parts)
    note = f'<p class="note" role="status">{escape(turn.note)}</p>' if turn.note else ""
    return f'<div class="answer">{parts}{note}</div>' if parts or note else ""


def progress(turn: Turn, now: float) -> str:
    """How far an answer is."""
    last = turn.last
    if isinstance(last, Drawing):
        done = last.step + 1
        words = f"Drawing: step {done} of {last.steps}{_left(done, last.steps, now - last.began)}"
        return _bar(f'value="{done}" max="{last.steps}"', words)
    if isinstance(last, Words) and not last.is_whole:
        return _bar("", "Thinking" if split_thought(last.text)[1] == "" else "Writing")
    return _bar("", "Reading")


def file_url(file: Path) -> str:
    """Where a browser finds a file, behind whatever path the page has."""
    return f"{API_PREFIX.lstrip('/')}/file={quote(str(file))}"


def _bar(attributes: str, words: str) -> str:
    return (
        f'<div class="progress"><progress {attributes} aria-label="{escape(words)}"></progress>'
        f"<span>{escape(words)}</span></div>"
    )


def _left(done: int, steps: int, seconds: float) -> str:
    """The time that is left, from that of the steps behind the first, which began it."""
    if done < 2:
        return ""
    left = seconds / (done - 1) * (steps - done)
    return f", {left:.0f} s left" if left < 100 else f", {left / 60:.0f} min left"


def _beginning() -> str:
    buttons = "".join(
        f'<button type="button" data-act="example" data-value="{number}">{_shown(example.shown)}'
        f"<span>{escape(example.text)}</span></button>"
        for number, example in enumerate(EXAMPLES)
    )
    return f'<div class="beginning"><p>Say something, show a picture, or begin with one of these.</p>{buttons}</div>'


def _turn(turn: Turn, answered: str) -> str:
    text = f"<p>{escape(turn.text)}</p>" if turn.text else ""
    return f'<section><div class="asked">{_shown(turn.shown)}{text}</div>{answered}</section>'


def _shown(files: Sequence[Path]) -> str:
    return "".join(f'<img src="{file_url(file)}" alt="A picture that is shown">' for file in files)


def _part(part: Words | Drawing | Picture) -> str:
    if isinstance(part, Words):
        thought, words = split_thought(part.text)
        folded = f"<details><summary>Thought</summary><p>{escape(thought)}</p></details>" if thought else ""
        return folded + (f'<div class="words">{_MARKDOWN.render(words)}</div>' if words else "")
    if isinstance(part, Drawing):
        image = part.preview
        shown = (
            f'<img src="{_data_url(image)}" alt="The picture as it forms">' if image else '<div class="blank"></div>'
        )
        return f'<figure class="forming">{shown}</figure>'
    return _drawn(part)


def _drawn(picture: Picture) -> str:
    width, height = picture.size
    url, name = file_url(picture.file), escape(picture.file.name)
    return (
        f'<figure><img src="{url}" width="{width}" height="{height}" alt="{escape(picture.prompt)}">'
        f'<figcaption><button type="button" data-act="edit" data-value="{name}">Edit this picture</button>'
        f'<a href="{url}" download="{name}">Download</a>'
        f'<button type="button" data-act="seed" data-value="{picture.seed}" title="Draw with this seed from now on">'
        f"Seed {picture.seed}</button></figcaption></figure>"
    )


def _data_url(image: PIL.Image.Image) -> str:
    """A preview inside the page: it is of no use when the next one comes."""
    small, stream = image.copy(), io.BytesIO()
    small.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    small.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
