# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""One browser's conversation: what was said, the answer in the making, and all pictures."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image

from bagel_cli.files import description
from bagel_server import EngineClosed, EngineFull
from diffusers_bagel import BagelSession, SessionEvent
from transformers_bagel.image_processing_bagel import to_rgb
from transformers_bagel.threads import run_in_own_thread

from .choices import Choices


logger = logging.getLogger(__name__)
STOPPED = "Stopped."
FORGOTTEN = "Stopped before anything was finished: the message is forgotten."
# What somebody who asks can do something about; the rest is logged, too.
NOT_ANSWERED = (ValueError, TypeError, EngineFull, EngineClosed, TimeoutError)
# Between two updates of the page: tokens come faster than anybody reads.
LEAST_SECONDS = 0.04


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
    steps: int = 1
    preview: PIL.Image.Image | None = None


@dataclass
class Picture:
    """
    A picture that was drawn.

    Attributes:
        file (`Path`)
        prompt (`str`): What was said before.
        seed (`int`)
        size (`tuple[int, int]`): Width and height.
    """

    file: Path
    prompt: str
    seed: int
    size: tuple[int, int]


@dataclass
class Turn:
    """
    Something that was said, and its answer.

    Attributes:
        text (`str`), shown (`list[Path]`), choices (`Choices`): What was said, with which pictures, to be answered how.
        parts (`list`): The answer, of which the last part may be in the making.
        note (`str`): Why the answer ended, unless it is whole.
        is_remembered (`bool`): Whether the session knows of it.
    """

    text: str
    shown: list[Path]
    choices: Choices
    parts: list[Words | Drawing | Picture] = field(default_factory=list)
    note: str = ""
    is_remembered: bool = False

    @property
    def last(self) -> Words | Drawing | Picture | None:
        """The part that came last."""
        return self.parts[-1] if self.parts else None

    def hear(self, event: SessionEvent, now: float) -> None:
        """An event of the answer, other than a whole picture."""
        last = self.last
        if event.type == "text":
            if not isinstance(last, Words) or last.is_whole:
                last = Words()
                self.parts.append(last)
            last.text += event.text or ""
            last.is_whole = event.is_whole
        elif event.step is not None:
            if not isinstance(last, Drawing):
                last = Drawing(now, steps=self.choices.steps)
                self.parts.append(last)
            last.step = event.step
            last.steps = event.steps or last.steps
            last.preview = event.image or last.preview

    def keep(self, picture: Picture) -> None:
        """A whole picture, in the place of the drawing that it was."""
        if isinstance(self.last, Drawing):
            self.parts.pop()
        self.parts.append(picture)

    def end(self, note: str = "") -> None:
        """Nothing more comes: what is not whole is dropped."""
        self.parts = [part for part in self.parts if isinstance(part, Picture) or getattr(part, "is_whole", False)]
        self.note = note


class Talk:
    """
    One browser's conversation.

    Args:
        folder (`Path`): In which it keeps its pictures, under a name that nobody can guess.

    Attributes:
        turns (`list[Turn]`): As the page shows them.
        pictures (`list[Picture]`): All that were drawn since the page was opened.
        chosen (`int`): The picture of all that was chosen last.
        is_answering (`bool`)
        is_left (`bool`): Whether nobody looks.
    """

    def __init__(self, folder: Path):
        self.folder = folder / secrets.token_urlsafe(16)
        self.turns: list[Turn] = []
        self.pictures: list[Picture] = []
        self.chosen = 0
        self.is_answering = False
        self._session: BagelSession | None = None
        self._answer: Any = None
        self._is_stopped = self.is_left = False
        # Whoever has it may change the session, or put it away.
        self._lock = asyncio.Lock()

    async def say(self, engine: Any, turn: Turn) -> AsyncIterator[None]:
        """
        Say something and answer it.

        Args:
            engine ([`Engine`]): That makes the answer.
            turn ([`Turn`]): What is said; its answer grows.

        Yields:
            `None`, whenever there is more of the answer.
        """
        self.turns.append(turn)
        self.is_answering, self._is_stopped, self.is_left = True, False, False
        changed = asyncio.Event()
        # A task of its own, which comes to its end if whoever asked closes the page.
        making = asyncio.create_task(self._make(engine, turn, changed))
        try:
            while not making.done():
                await changed.wait()
                changed.clear()
                yield
                await asyncio.sleep(LEAST_SECONDS)
            making.result()
        finally:
            if not making.done():
                self.stop()

    def stop(self) -> None:
        """End the answer; what is whole of it stays."""
        self._is_stopped = True
        if self._answer is not None:
            self._answer.cancel()

    async def again(self, pipe: Any) -> Turn:
        """Forget the last turn, to say the same once more. Its pictures stay among all."""
        # A second click, while it waits, would forget another turn.
        self.is_answering = True
        try:
            async with self._lock:
                turn = self.turns.pop()
                if turn.is_remembered:
                    (await run_in_own_thread(self._awake, pipe)).back()
        finally:
            self.is_answering = False
        return turn

    async def clear(self) -> None:
        """Begin anew. All pictures stay."""
        async with self._lock:
            self.turns, self._session = [], None
            shutil.rmtree(self._saved, ignore_errors=True)

    async def rest(self) -> None:
        """Keep what was said on the disk alone, without keys and values, until somebody goes on."""
        async with self._lock:
            if self._session is not None:
                await asyncio.to_thread(self._put_away, self._session)
                self._session = None

    async def leave(self) -> None:
        """The page is closed, or asleep."""
        self.is_left = True
        self.stop()
        await self.rest()

    def close(self) -> None:
        """Nobody goes on: forget everything."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _make(self, engine: Any, turn: Turn, changed: asyncio.Event) -> None:
        note = ""
        await self._lock.acquire()
        try:
            session = await run_in_own_thread(self._awake, engine.pipe)
            before = len(session.messages)
            content = [*(await asyncio.to_thread(opened, turn.shown)), *([turn.text] if turn.text else [])]
            submit = partial(engine.submit, session, content, **turn.choices.settings())
            self._answer = await run_in_own_thread(submit)
            if self._is_stopped:
                self._answer.cancel()
            try:
                async for event in self._answer:
                    if event.type == "image":
                        turn.keep(await asyncio.to_thread(self._kept, event.image, turn, engine.pipe))
                    else:
                        turn.hear(event, time.monotonic())
                    changed.set()
            finally:
                if len(session.messages) == before + 1:
                    session.back()
                turn.is_remembered = len(session.messages) > before
            if self._is_stopped:
                note = STOPPED if turn.is_remembered else FORGOTTEN
        except NOT_ANSWERED as error:
            note = str(error)
        except Exception as error:
            logger.exception("an answer failed")
            note = f"The answer failed: {error}"
        finally:
            turn.end(note)
            self.is_answering, self._answer = False, None
            self._lock.release()
            changed.set()

    @property
    def _saved(self) -> Path:
        return self.folder / "session"

    def _awake(self, pipe: Any) -> BagelSession:
        """The session, in the memory."""
        if self._session is None:
            is_saved = self._saved.is_dir()
            self._session = BagelSession.from_pretrained(self._saved, pipe) if is_saved else BagelSession(pipe)
        return self._session

    def _put_away(self, session: BagelSession) -> None:
        self.folder.mkdir(exist_ok=True)
        session.save_pretrained(self._saved)

    def _kept(self, image: PIL.Image.Image, turn: Turn, pipe: Any) -> Picture:
        """A drawn picture as a file that says how to draw it again."""
        self.folder.mkdir(exist_ok=True)
        file = self.folder / f"bagel-{len(self.pictures) + 1}.png"
        image.save(file, pnginfo=description(turn.text, pipe.transformer.name_or_path, turn.choices.described()))
        picture = Picture(file, turn.text, turn.choices.seed, image.size)
        self.pictures.append(picture)
        return picture


def opened(files: Sequence[Path]) -> list[PIL.Image.Image]:
    """
    Pictures that were shown, as the model sees them.

    Raises:
        ValueError: naming one that cannot be read.
    """
    images = []
    for file in files:
        try:
            with PIL.Image.open(file) as image:
                images.append(to_rgb(image))
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise ValueError(f"'{file.name}' cannot be read as a picture.") from error
    return images
