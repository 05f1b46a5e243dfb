# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""One browser's conversation: what was said, the answer in the making, and all pictures."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from bagel_cli.files import description
from diffusers_bagel import BagelSession, SessionEvent

from .choices import Choices


STOPPED = "Stopped."
FORGOTTEN = "Stopped before anything was finished; the message is forgotten."


@dataclass
class Words:
    """A text of an answer, thoughts included."""

    text: str = ""
    is_whole: bool = False


@dataclass
class Drawing:
    """A picture in the making."""

    began: float
    step: int = -1
    steps: int | None = None
    preview: PIL.Image.Image | None = None


@dataclass
class Picture:
    """
    A picture that was drawn or shown.

    Attributes:
        file (`Path`)
        size (`tuple[int, int]`): Width and height.
        prompt (`str`): What was said before it was drawn.
        seed (`int`, *optional*): Of one that was drawn.
        number (`int`, *optional*): Its place among all that were drawn.
    """

    file: Path
    size: tuple[int, int]
    prompt: str = ""
    seed: int | None = None
    number: int | None = None


@dataclass
class Turn:
    """Something that was said, and its answer."""

    text: str
    shown: list[Picture]
    choices: Choices
    parts: list[Words | Drawing | Picture] = field(default_factory=list)
    note: str = ""
    is_remembered: bool = False

    def hear(self, event: SessionEvent, now: float) -> None:
        """An event of the answer, but for whole pictures, which a [`Talk`] keeps."""
        last = self.parts[-1] if self.parts else None
        if event.type == "text":
            if not isinstance(last, Words) or last.is_whole:
                last = Words()
                self.parts.append(last)
            last.text += event.text or ""
            last.is_whole = event.is_whole
        elif event.type in ("progress", "preview"):
            if not isinstance(last, Drawing):
                last = Drawing(now)
                self.parts.append(last)
            last.step = last.step if event.step is None else event.step
            last.steps = getattr(event, "steps", None) or last.steps
            last.preview = event.image or last.preview

    def end(self, note: str) -> None:
        """Nothing more comes: what is not whole is dropped."""
        self.parts = [part for part in self.parts if isinstance(part, Picture) or getattr(part, "is_whole", False)]
        self.note = note


class Talk:
    """
    One browser's conversation.

    Attributes:
        turns (`list[Turn]`): As the page shows them.
        pictures (`list[Picture]`): All that were drawn since the page was opened.
        answer: What is being answered now, if anything is.
    """

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.pictures: list[Picture] = []
        self.answer: Any = None
        self._session: BagelSession | None = None
        self._is_stopped = False
        self._folder: tempfile.TemporaryDirectory | None = None

    @property
    def is_answering(self) -> bool:
        return bool(self.turns) and self._is_open

    async def say(self, engine: Any, text: str, files: list[str], choices: Choices) -> AsyncIterator[Turn]:
        ...
