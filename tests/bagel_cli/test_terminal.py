"""Pictures go to terminals that say that they can show them, and nowhere else."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import PIL.Image
import pytest

from bagel_cli.terminal import MAX_PART, MAX_SIDE, as_characters, graphics_protocol
from tests.conftest import golden_image


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "220400"}, "kitty"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "211203"}, None),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "new"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm", "KITTY_WINDOW_ID": "1"}, "iterm2"),
        ({"TERM": "xterm-kitty", "TERM_PROGRAM": "vscode"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-256color", "TMUX": "/tmp/tmux", "TERM_PROGRAM": "iTerm.app"}, None),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_a_terminal_shows_pictures_as_it_says_of_itself(environment, protocol):
    assert graphics_protocol(environment) == protocol


def shown(characters: str, protocol: str) -> np.ndarray:
    """The picture that a terminal finds in what is written to it."""
    if protocol == "iterm2":
        (found,) = re.findall(r"^\033\]1337;File=inline=1;size=(\d+):([^\a]*)\a\n$", characters)
        content = base64.b64decode(found[1])
        assert len(content) == int(found[0])
    else:
        parts = re.findall(r"\033_G([^;]*);([^\033]*)\033\\", characters)
        assert "".join(f"\033_G{keys};{data}\033\\" for keys, data in parts) + "\n" == characters
        keys = [keys for keys, _ in parts]
        assert keys[0] == f"a=T,f=100,q=2,m={int(len(parts) > 1)}" and all(len(data) <= MAX_PART for _, data in parts)
        assert keys[1:] == ["m=1"] * (len(parts) - 2) + ["m=0"] * (len(parts) > 1)
        content = base64.b64decode("".join(data for _, data in parts))
    return np.asarray(PIL.Image.open(io.BytesIO(content), formats=["PNG"]))


@pytest.mark.parametrize("protocol", ["kitty", "iterm2"])
def test_what_is_written_is_the_picture(protocol):
    small = PIL.Image.new("RGB", (8, 8), "red")
    noisy = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    for image in (small, noisy, golden_image("wide").convert("RGB")):
        assert np.array_equal(shown(as_characters(image, protocol), protocol), np.asarray(image))


@pytest.mark.parametrize("protocol", ["kitty", "iterm2"])
def test_a_large_picture_is_shown_smaller_and_stays_as_it_is(protocol):
    large = PIL.Image.new("RGB", (4 * MAX_SIDE, MAX_SIDE), "blue")
    assert shown(as_characters(large, protocol), protocol).shape == (MAX_SIDE // 4, MAX_SIDE, 3)
    assert large.size == (4 * MAX_SIDE, MAX_SIDE)
