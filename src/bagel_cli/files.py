# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Files that a command reads and writes, looked at before anything is loaded."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shlex
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from bagel_bench import Picture, read_pictures


class CommandError(Exception):
    """A mistake that the user can mend, told in one sentence."""


def check_model(name: str) -> None:
    """
    Refuse what is neither a folder nor the id of a repository.

    Raises:
        CommandError: naming it.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or os.path.exists(name)
    if looks_local and not os.path.isdir(os.path.expanduser(name)):
        raise CommandError(f"--model '{name}' is no folder; pass a folder with a BAGEL checkpoint, or a Hub id.")


def check_output(name: str) -> Path:
    """
    Where a picture is to be written, as it was named.

    Raises:
        CommandError: if it could not be written there.
    """
    named = Path(os.path.expanduser(name))
    output = _behind_links(named)
    try:
        image_format = PIL.Image.registered_extensions()[output.suffix.lower()]
        PIL.Image.new("RGB", (16, 16)).save(io.BytesIO(), image_format)
    except (KeyError, OSError, ValueError) as error:
        raise CommandError(
            f"--output must end in the name of an image format that can be written, such as .png, got '{output}'."
        ) from error
    if not output.parent.is_dir():
        raise CommandError(f"--output lies in the folder '{output.parent}', which does not exist.")
    is_other = output.exists() and not output.is_file()
    if is_other or not os.access(output.parent, os.W_OK | os.X_OK):
        raise CommandError(f"--output '{output}' cannot be written: name another file.")
    return named


def _behind_links(file: Path) -> Path:
    """The file that a link leads to, so that what is written does not take the place of the link."""
    return Path(os.path.realpath(file))


def sentence(error: BaseException) -> str:
    """The first line of an error, with arguments called as the command calls them."""
    text = (str(error).strip() or repr(error)).split("\n")[0]
    text = (
        text.replace("`num_inference_steps`", "--steps").replace("`output`", "--answer").replace("`back()`", "/back")
    )
    for name in (
        "height",
        "width",
        "guidance_scale",
        "image_guidance_scale",
        "guidance_tolerance",
        "max_new_tokens",
        "temperature",
        "protocol",
    ):
        text = text.replace(f"`{name}`", f"--{name.replace('_', '-')}")
    return text


def check_session(name: str) -> Path:
    """
    The folder of a session, which need not be there yet.

    Raises:
        CommandError: if it could not be written.
    """
    folder = Path(os.path.realpath(os.path.expanduser(name)))
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--session '{folder}' is a file: name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "session.json").is_file():
        raise CommandError(f"--session '{folder}' holds no conversation, but other files: name a new folder.")
    if not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK | os.X_OK):
        raise CommandError(f"--session lies in the folder '{folder.parent}', in which nothing can be written.")
    return folder


def numbered(output: Path) -> Path:
    """The first name like that of a file, with a number, that is still free."""
    names = (output.with_stem(f"{output.stem}-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def check_text(text: str) -> None:
    """
    Refuse a text of bytes that are not UTF-8, which Python reads as half characters.

    Raises:
        CommandError: if it is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CommandError("the text is not UTF-8: type it again.") from error


def open_picture(path: str) -> PIL.Image.Image:
    """
    A picture file, read.

    Raises:
        CommandError: if it cannot be.
    """
    file = os.path.expanduser(path)
    if os.path.exists(file) and not os.path.isfile(file):
        raise CommandError(f"the picture '{path}' cannot be read: it is no file.")
    try:
        with warnings.catch_warnings(action="ignore"):
            image = PIL.Image.open(file)
            image.load()
        return image
    except PIL.Image.DecompressionBombError as error:
        raise CommandError(f"the picture '{path}' is over Pillow's pixel limit.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise CommandError(f"the picture '{path}' cannot be read: {str(error).splitlines()[0]}") from error


def typed_paths(text: str) -> list[str]:
    """Paths as they are typed into a chat: one as it is, or several with quotes or backslashes as in a shell.

    Raises:
        CommandError: if there is none, or a quote is not closed.
    """
    if os.path.exists(os.path.expanduser(text)) and text:
        return [text]
    try:
        paths = shlex.split(text)
    except ValueError as error:
        raise CommandError(f"/image {text}: a quote is not closed.") from error
    if not paths:
        raise CommandError("/image needs the path of a picture.")
    return paths


def description(prompt: str, model: str, settings: Mapping[str, Any]) -> PngInfo:
    """
    What a PNG says of itself, in text chunks: how to draw it again.

    Args:
        prompt (`str`): What was said before it was drawn.
        model (`str`): Folder or Hub id of the checkpoint, of which a folder is called by its last two names.
        settings (`Mapping`): Of the drawing, as JSON can hold them; what is `None` is left out.
    """
    # Not before something was drawn: the package imports the libraries.
    from diffusers_bagel import __version__

    chunks = PngInfo()
    chunks.add_text("prompt", prompt)
    chunks.add_text("model", "/".join(Path(model).parts[-2:]))
    chunks.add_text("settings", json.dumps({name: value for name, value in settings.items() if value is not None}))
    chunks.add_text("Software", f"transformers-bagel {__version__}")
    return chunks


def save_picture(image: PIL.Image.Image, output: Path, pnginfo: PngInfo | None = None) -> None:
    """
    Write the whole file, or none. A PNG gets a [`description`]; other formats have no place for it.

    Raises:
        CommandError: if it could not be written; the picture is then kept in the folder of temporary files.
    """
    place = _behind_links(output)
    temporary = place.with_name(f".{place.stem}.{os.getpid()}{place.suffix}")
    try:
        image.save(temporary, pnginfo=pnginfo)
        os.replace(temporary, place)
    except (OSError, ValueError) as error:
        with tempfile.NamedTemporaryFile(prefix="bagel-", suffix=".png", delete=False) as kept:
            image.save(kept, "PNG", pnginfo=pnginfo)
        raise CommandError(f"'{output}' could not be written ({error}); the picture is in '{kept.name}'.") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_benchmark(options: argparse.Namespace) -> tuple[list[Picture], dict[str, str]]:
    """
    What a benchmark asks for, and what is wrong with its other rows, by where they stand.

    Raises:
        CommandError: if the prompts cannot be read, or not all of them and none is to be skipped.
    """
    prompts = Path(os.path.expanduser(options.prompts))
    images = None if options.image_folder is None else Path(os.path.expanduser(options.image_folder))
    try:
        pictures, broken = read_pictures(options.benchmark, prompts, images, options.samples)
    except (OSError, ValueError) as error:
        raise CommandError(f"--prompts cannot be read: {error}") from error
    if broken and options.on_error == "stop":
        where, reason = next(iter(broken.items()))
        more = f" So are {len(broken) - 1} more." if len(broken) > 1 else ""
        raise CommandError(f"'{prompts}', {where}, is broken: {reason}{more} '--on-error skip' leaves them out.")
    if not pictures:
        raise CommandError(f"'{prompts}' holds no row that could be drawn.")
    return pictures, broken
