# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Arguments that are refused before there is anything to measure, not after it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def need_at_least(least: int, parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse smaller numbers; an argument may have several, or none."""
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {number}.")


def need_output(parser: argparse.ArgumentParser, name: str, *files: Path | None) -> None:
    """Refuse files that cannot be written; none need be given."""
    for file in filter(None, files):
        folder = Path(os.path.realpath(file)).parent
        if not folder.is_dir():
            parser.error(f"--{name}: '{file}' cannot be written, for there is no folder '{folder}'.")
        if file.is_dir():
            parser.error(f"--{name}: '{file}' cannot be written, for it is a folder.")
        if not os.access(file if file.exists() else folder, os.W_OK):
            parser.error(f"--{name}: '{file}' cannot be written by who runs this.")
