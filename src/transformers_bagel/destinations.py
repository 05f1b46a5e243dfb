# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Places to write to, which are looked at before there is anything to write."""

from __future__ import annotations

import os
from pathlib import Path


def destination(path: str | os.PathLike, name: str) -> Path:
    """
    The folder that a path means: `~` is the home, and links are followed. It may still have to be made.

    Args:
        path (`str` or `os.PathLike`)
        name (`str`): What the user calls it, for errors.

    Raises:
        OSError: if it is a file, lies below one or behind a link that leads nowhere, or cannot be written to.
    """
    place = Path(os.path.expanduser(path))
    for part in (place, *place.parents):
        if part.is_symlink() and not part.exists():
            raise FileNotFoundError(
                f"{name} '{path}': '{part}' is a link to '{os.readlink(part)}', which is not there."
            )
    place = Path(os.path.realpath(place))
    nearest = next(part for part in (place, *place.parents) if part.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{name} '{path}' must be a folder, but '{nearest}' is a file. Name another one.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{name} '{path}': nothing can be written to '{nearest}'. Name another folder.")
    return place
