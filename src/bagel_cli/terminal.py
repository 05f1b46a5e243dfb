# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Pictures inside a terminal that says of itself that it can show them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import PIL.Image


# Longest side in pixels: what a line of text and the scroll bar leave.
MAX_SIDE = 512
# Characters of a part of a picture in kitty's protocol.
MAX_PART = 4096


def graphics_protocol(environment: Mapping[str, str]) -> str | None:
    """
    `"kitty"`, `"iterm2"`, or `None` where nothing is known of pictures, by the variables that terminals set.

    Multiplexers hide which terminal is behind them, and swallow what they do not know.
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" in environment or term.startswith(("tmux", "screen", "dumb")):
        return None
    if term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty", "vscode") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    konsole = environment.get("KONSOLE_VERSION", "")
    is_new = konsole.isdecimal() and int(konsole) >= 220400
    return "kitty" if is_new or "KITTY_WINDOW_ID" in environment else None


def as_characters(image: PIL.Image.Image, protocol: str) -> str:
    """What a terminal shows as a picture, smaller if it is large, with the end of its line."""
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    if protocol == "iterm2":
        return f"\033]1337;File=inline=1;size={stream.tell()}:{data}\a\n"
    # Transmit and display a PNG, and answer nothing, which would be read as typed.
    control, sequence = "a=T,f=100,q=2,", ""
    for start in range(0, len(data), MAX_PART):
        has_more = int(start + MAX_PART < len(data))
        sequence += f"\033_G{control}m={has_more};{data[start : start + MAX_PART]}\033\\"
        control = ""
    return f"{sequence}\n"
