# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What the commands do, once their arguments are known to be right."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import PIL.Image
import torch
import transformers
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers import TextStreamer
from transformers.utils import cached_file

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.image_processing_bagel import to_rgb

from .conversation import Conversation
from .files import CommandError, check_text, open_picture, save_picture, typed_paths
from .fitting import are_packed, choose, loading_arguments
from .information import describe


# Out of memory is a `RuntimeError`; those of the Hub's client are no `OSError`.
NOT_LOADED = (OSError, ValueError, ImportError, RuntimeError, MemoryError, HTTPError, SafetensorError)
NOT_ANSWERED = (ValueError, TypeError, MemoryError, torch.OutOfMemoryError)


def draw(options: argparse.Namespace) -> None:
    """Draw a picture of a text, or change pictures as told."""
    images = [_upright(image) for image in options.images]
    device = find_device(options.device)
    settings = {
        name: getattr(options, name)
        for name in ("height", "width", "guidance_scale", "image_guidance_scale")
        if getattr(options, name) is not None
    }
    with _quiet(), _loaded(options, BagelPipeline, device) as pipe:
        try:
            out = pipe(
                prompt=options.prompt,
                image=images or None,
                num_inference_steps=options.steps,
                think=options.think,
                generator=torch.Generator("cpu").manual_seed(options.seed),
                **settings,
            )
        except NOT_ANSWERED as error:
            raise CommandError(sentence(error)) from error
    if out.texts:
        print(out.texts[0])
    save_picture(out.images[0], options.output)
    print(f"{options.output}: {out.images[0].width} x {out.images[0].height}")


edit = draw


def ask(options: argparse.Namespace) -> None:
    """Answer a question about pictures."""
    images = [_upright(image) for image in options.images]
    with _speaker(options) as (model, processor):
        _answer(Conversation(model, processor), images, options.prompt, options)


def chat(options: argparse.Namespace) -> None:
    """Talk, line by line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are not UTF-8 spoil their line only.
        sys.stdin.reconfigure(errors="surrogateescape")
    with _speaker(options) as (model, processor):
        print("Type a message. /image PATH shows a picture, /new starts over, /quit ends.")
        conversation = Conversation(model, processor)
        images: list[PIL.Image.Image] = []
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return
            command, _, rest = line.partition(" ")
            try:
                check_text(line)
                if command == "/quit":
                    return
                if command == "/new":
                    conversation, images = Conversation(model, processor), []
                elif command == "/image":
                    images += [_upright(open_picture(path)) for path in typed_paths(rest.strip())]
                elif line.startswith("/"):
                    print("error: known commands are /image PATH, /new and /quit.")
                elif line:
                    shown, images = images, []
                    _answer(conversation, shown, line, options)
            except CommandError as error:
                # What was said before is remembered, this is not.
                print(f"error: {error}")


def info(options: argparse.Namespace) -> None:
    """Tell what a repository holds, and what of it would fit into this machine."""
    with _quiet():
        try:
            print(describe(os.path.expanduser(options.model), find_device(options.device)))
        except NOT_LOADED as error:
            raise CommandError(f"'{options.model}' cannot be read: {sentence(error)}") from error


def find_device(name: str | None) -> torch.device:
    """
    The device that was asked for, or the first that is there.

    Raises:
        CommandError: if it cannot be used.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device '{name}' cannot be used here: {sentence(error)}") from error
    return device


def sentence(error: BaseException) -> str:
    """The first line of an error, with arguments called as the command calls them."""
    text = (str(error).strip() or repr(error)).split("\n")[0]
    text = text.replace("`num_inference_steps`", "--steps")
    for name in ("height", "width", "guidance_scale", "image_guidance_scale", "max_new_tokens", "temperature"):
        text = text.replace(f"`{name}`", f"--{name.replace('_', '-')}")
    return text


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """A picture that was read, as the model sees it."""
    try:
        return to_rgb(image)
    except (OSError, ValueError) as error:
        name = getattr(image, "filename", "")
        raise CommandError(f"the picture '{name}' cannot be taken: {sentence(error)}") from error


def _answer(conversation: Conversation, images: list[PIL.Image.Image], text: str, options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    streamer = TextStreamer(conversation.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    try:
        conversation.send(
            images,
            text,
            think=options.think,
            raw_tokens=options.raw_tokens,
            streamer=streamer,
            max_new_tokens=options.max_new_tokens,
            **sampling,
        )
    except NOT_ANSWERED as error:
        raise CommandError(sentence(error)) from error


@contextmanager
def _speaker(options: argparse.Namespace) -> Iterator[tuple[BagelForConditionalGeneration, BagelProcessor]]:
    """The model without `visual_gen`, which needs half the memory, and the processor."""
    device = find_device(options.device)
    with _quiet():
        processor = _load(options, BagelProcessor, component="processor")
        with _loaded(options, BagelForConditionalGeneration, device, visual_gen=False) as model:
            yield model, processor


@contextmanager
def _loaded(options: argparse.Namespace, loader: Any, device: torch.device, **modules: bool) -> Iterator[Any]:
    """A pipeline, or the model without some modules, in the way that fits."""
    draws = loader is BagelPipeline
    config = _load(options, BagelConfig, component="transformer")
    with _told(options):
        packed = are_packed(*_place(options, "transformer"), config)
    way = choose(config, device, draws, options.dtype, options.low_memory, packed)
    with loading_arguments(way, config, draws, device) as arguments:
        if not way.on_disk:
            yield _load(options, loader, None if draws else "transformer", device, **arguments, **modules)
            return
        # diffusers puts no part of a component on the disk.
        model = _load(options, BagelForConditionalGeneration, "transformer", **arguments, **modules)
        if not draws:
            yield model
            return
        pipe = _load(options, BagelPipeline, transformer=model, dtype=way.dtype)
        pipe.vae.to(device)
        yield pipe


def _load(
    options: argparse.Namespace,
    loader: Any,
    component: str | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Any:
    """Load a pipeline; or one component, which diffusers' layout keeps in a folder of its own."""
    with _told(options):
        name, subfolder = _place(options, component)
        loaded = loader.from_pretrained(name, **subfolder, **kwargs)
        return loaded if device is None else loaded.to(device)


def _place(options: argparse.Namespace, component: str | None) -> tuple[str, dict[str, str]]:
    """The folder or Hub id, and the `subfolder` of a component if it has one."""
    name = os.path.expanduser(options.model) if os.path.isdir(os.path.expanduser(options.model)) else options.model
    if component is None:
        return name, {}
    file = {"transformer": "config.json", "processor": "processor_config.json"}[component]
    found = cached_file(name, file, subfolder=component, _raise_exceptions_for_missing_entries=False)
    return name, {"subfolder": component} if found else {}


@contextmanager
def _told(options: argparse.Namespace) -> Iterator[None]:
    """What loading fails on, as one sentence."""
    try:
        yield
    except NOT_LOADED as error:
        what = "the folder" if os.path.isdir(os.path.expanduser(options.model)) else "the Hub repository"
        raise CommandError(
            f"no BAGEL checkpoint could be loaded from {what} '{options.model}': {sentence(error)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the libraries, whose loggers have handlers of their own."""
    before = transformers.logging.get_verbosity(), diffusers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before[0])
        diffusers.logging.set_verbosity(before[1])
