# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Files that a command reads and writes, looked at before anything is loaded."""

from __future__ import annotations

import io
import os
import shlex
import tempfile
import warnings
from pathlib import Path

import PIL.Image


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
    Where a picture is to be written; links are followed, so that what is written takes the place of its name.

    Raises:
        CommandError: if it could not be written there.
    """
    output = Path(os.path.realpath(os.path.expanduser(name)))
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
    return output


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


def save_picture(image: PIL.Image.Image, output: Path) -> None:
    """
    Write the whole file, or none.

    Raises:
        CommandError: if it could not be written; the picture is then kept in the folder of temporary files.
    """
    temporary = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
    try:
        image.save(temporary)
        os.replace(temporary, output)
    except (OSError, ValueError) as error:
        with tempfile.NamedTemporaryFile(prefix="bagel-", suffix=".png", delete=False) as kept:
            image.save(kept, "PNG")
        raise CommandError(f"'{output}' could not be written ({error}); the picture is in '{kept.name}'.") from error
    finally:
        temporary.unlink(missing_ok=True)
