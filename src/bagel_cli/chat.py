# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A conversation with whoever types: lines are said, or are commands."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from diffusers_bagel import BagelSession
from transformers_bagel.image_processing_bagel import to_rgb

from .arguments import parse_settings, setting_names
from .files import (
    CommandError,
    check_session,
    check_text,
    description,
    numbered,
    open_picture,
    save_picture,
    sentence,
    typed_paths,
)
from .terminal import as_characters, graphics_protocol


NOT_ANSWERED = (ValueError, TypeError, MemoryError, torch.OutOfMemoryError)
GREETING = "Type a message. /image PATH shows a picture, /draw TEXT draws one, /help tells the rest."
# By the names of `transformers chat` where it has the same; its mark, an exclamation mark, is taken as well.
COMMANDS = {
    "help": ("", "tells what can be typed"),
    "image": ("PATH ...", "shows pictures with the next message"),
    "say": ("TEXT", "is answered in words"),
    "draw": ("TEXT", "is answered with a picture, drawn from all that was said and shown"),
    "both": ("TEXT", "is answered in words and pictures in turn"),
    "back": ("[N]", "forgets the last message and its answer, or the last N"),
    "history": ("", "tells what was said"),
    "set": ("NAME=VALUE ...", "changes settings, by their names on the command line, such as steps=20 or no-think"),
    "status": ("", "tells the settings"),
    "save": ("DIR", "keeps the conversation in a folder, for --session"),
    "clear": ("", "starts over, as /new does"),
    "exit": ("", "ends, as /quit does"),
}
ALIASES = {"new": "clear", "quit": "exit"}
OUTPUTS = {"say": "text", "draw": "image", "both": "interleaved"}


class Chat:
    """
    Talks with a user on the standard streams: answers and names of pictures go out, mistakes are errors.

    Args:
        session ([`BagelSession`]): What was said.
        options (`argparse.Namespace`): Of the command.
    """

    def __init__(self, session: BagelSession, options: argparse.Namespace):
        self.session, self.options = session, options
        self.generator = torch.Generator().manual_seed(options.seed)
        self.graphics = graphics_protocol(os.environ) if sys.stdout.isatty() else None
        self.is_interactive = sys.stdin.isatty()
        # Shown with the next message.
        self.images: list[PIL.Image.Image] = []
        # Of pictures, by their ids.
        self.files: dict[int, str] = {}

    def run(self) -> None:
        """Talk until the input ends."""
        if self.is_interactive:
            with suppress(ImportError):
                # Lines can be edited, and come again.
                import readline  # noqa: F401
            print(GREETING)
            if self.session.messages:
                self._note(f"{len(self.session.messages)} messages are there: /history tells them")
        while True:
            try:
                line = input("> " if self.is_interactive else "").strip()
            except EOFError:
                if self.is_interactive:
                    print()
                return
            try:
                check_text(line)
                if line[:1] in ("/", "!"):
                    name, _, rest = line[1:].partition(" ")
                    name = ALIASES.get(name, name)
                    if name == "exit":
                        return
                    self.obey(name, rest.strip())
                elif line:
                    self.turn(line, self.output)
            except CommandError as error:
                # What was said before is remembered, this is not.
                _tell(error)

    @property
    def output(self) -> str:
        """Of what an answer is made, if a line does not say."""
        return self.options.answer or ("text" if self.session.protocol.name == "plain" else "auto")

    def obey(self, name: str, rest: str) -> None:
        """
        Do what a command says.

        Raises:
            CommandError: if it cannot be done.
        """
        if name in OUTPUTS:
            self.turn(rest, OUTPUTS[name])
        elif name in COMMANDS:
            getattr(self, f"_{name}")(rest)
        else:
            raise CommandError(f"known commands are /{', /'.join(COMMANDS)}.")

    def turn(self, text: str, output: str) -> None:
        """
        Say something with the pictures that were shown, and answer. It is forgotten if nothing of the answer became whole.

        Raises:
            CommandError: if it cannot be answered.
        """
        content = [*self.images, *([text] if text else [])]
        if not content:
            raise CommandError("there is nothing to answer: type a text behind the command.")
        shown, self.images = self.images, []
        count = len(self.session.messages)
        try:
            with self._interruptible() as interrupted:
                self.answer(content, output)
        finally:
            is_answered = len(self.session.messages) > count + 1
            if len(self.session.messages) == count + 1:
                self.session.back()
            self._keep()
        if interrupted:
            self._note("interrupted" + ("" if is_answered else ": the message is forgotten"))
            self.images = [] if is_answered else shown

    def answer(self, content: list[Any], output: str) -> None:
        """
        Answer on the standard output, word by word.

        Args:
            content (`list`): Texts and images.
            output (`str`): Of what the answer is made, see [`BagelSession.stream`].

        Raises:
            CommandError: if it cannot be answered.
        """
        is_inside_text = False
        try:
            for event in self.session.stream(content, output, **self._settings()):
                if event.type == "text":
                    is_inside_text = not event.is_whole
                    print(event.text, end="\n" if event.is_whole else "", flush=True)
                elif event.image is not None:
                    self._write(event.image, " ".join(part for part in content if isinstance(part, str)))
        except NOT_ANSWERED as error:
            raise CommandError(sentence(error)) from error
        finally:
            if is_inside_text:
                print()

    @contextmanager
    def _interruptible(self) -> Iterator[list[bool]]:
        """Ctrl+C ends the answer, and pressed once more the chat. What is yielded is not empty if it was pressed."""
        pressed: list[bool] = []

        def interrupt(*args: Any) -> None:
            signal.signal(signal.SIGINT, before)
            pressed.append(True)
            self.session.interrupt()

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield pressed
        finally:
            signal.signal(signal.SIGINT, before)

    def _settings(self) -> dict[str, Any]:
        """Of [`BagelSession.stream`]; what nobody has set is the protocol's."""
        options = vars(self.options)
        names = (
            *("height", "width", "guidance_scale", "image_guidance_scale", "guidance_tolerance", "preset", "think"),
            "max_new_tokens",
        )
        settings = {name: options.get(name) for name in names} | {"num_inference_steps": options["steps"]}
        if (temperature := options["temperature"]) is not None:
            settings |= {"do_sample": temperature > 0, "temperature": temperature or None}
        return settings | {"generator": self.generator, "sanitize_control_tokens": not options["raw_tokens"]}

    def _note(self, text: str) -> None:
        """What only somebody who types wants to know."""
        if self.is_interactive:
            print(f"({text})")

    def _keep(self, folder: Path | None = None) -> None:
        """Save the conversation in a folder, by default in the one that was named for it, if there is one."""
        folder = folder or self.options.session
        try:
            if folder is not None:
                self.session.save_pretrained(folder)
        except OSError as error:
            _tell(f"the conversation could not be kept in '{folder}': {sentence(error)}")

    def _write(self, image: PIL.Image.Image, prompt: str) -> None:
        file = numbered(self.options.output)
        chosen = {name: vars(self.options)[name] for name in setting_names() if name != "raw_tokens"}
        try:
            save_picture(image, file, description(prompt, self.options.model, chosen))
        except CommandError as error:
            _tell(error)
            self.files.pop(id(image), None)
            return
        self.files[id(image)] = str(file)
        self._show(image)

    def _show(self, image: PIL.Image.Image) -> None:
        if self.graphics is not None:
            print(as_characters(image, self.graphics), end="")
        print(f"{self.files.get(id(image), 'a picture')}: {image.width} x {image.height}", flush=True)

    def _help(self, rest: str) -> None:
        for name, (argument, meaning) in COMMANDS.items():
            print(f"{f'/{name} {argument}':22}{meaning}")
        print("Ctrl+C ends an answer, and Ctrl+D the chat.")

    def _image(self, rest: str) -> None:
        paths = typed_paths(rest)
        images = [upright(open_picture(path)) for path in paths]
        self.images += images
        self.files |= {id(image): path for image, path in zip(images, paths, strict=True)}
        for image in images if self.is_interactive else []:
            self._show(image)

    def _back(self, rest: str) -> None:
        if not (rest or "1").isdecimal():
            raise CommandError(f"/back takes a number of turns, got '{rest}'.")
        try:
            self.session.back(int(rest or 1))
        except ValueError as error:
            raise CommandError(f"/back: {sentence(error)}") from error
        self._keep()
        self._note(f"{len(self.session.messages)} messages are left")

    def _history(self, rest: str) -> None:
        for message in self.session.messages:
            for part in message["content"]:
                if part["type"] == "text":
                    print(("> " if message["role"] == "user" else "") + part["text"])
                else:
                    self._show(part["image"])

    def _set(self, rest: str) -> None:
        seed, self.options = self.options.seed, parse_settings(rest.split(), self.options)
        if self.options.seed != seed:
            self.generator.manual_seed(self.options.seed)

    def _status(self, rest: str) -> None:
        chosen = vars(self.options) | {"protocol": self.session.protocol.name, "answer": self.output}
        for name in ("model", "protocol", "session", *setting_names()):
            if chosen[name] is not None:
                print(f"{name.replace('_', '-')}: {chosen[name]}")

    def _save(self, rest: str) -> None:
        if not rest:
            raise CommandError("/save needs the name of a folder.")
        self._keep(check_session(rest))

    def _clear(self, rest: str) -> None:
        self.session, self.images = BagelSession(self.session.pipe, self.session.protocol), []
        self._keep()


def _tell(error: Any) -> None:
    print(f"error: {error}", file=sys.stderr)


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    A picture that was read, as the model sees it.

    Raises:
        CommandError: naming its file, if the model cannot take it.
    """
    try:
        return to_rgb(image)
    except (OSError, ValueError) as error:
        name = getattr(image, "filename", "")
        raise CommandError(f"the picture '{name}' cannot be taken: {sentence(error)}") from error
