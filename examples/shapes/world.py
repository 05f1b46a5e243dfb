# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The world of bagel-shapes: coloured shapes in the cells of a small picture, and what of it is never trained on."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

import PIL.Image
import PIL.ImageDraw


SIDE = 64
COLOURS = {
    "red": (220, 40, 40),
    "orange": (250, 135, 20),
    "yellow": (250, 230, 60),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "purple": (150, 40, 180),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
# Radii in pixels. Large ones do not jitter, or two neighbours would touch.
SIZES = {"small": 6.0, "medium": 8.0, "large": 9.5}
JITTER = {"small": 1, "medium": 1, "large": 0}
CELLS = (
    "top left",
    "top",
    "top right",
    "left",
    "middle",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
CENTRES = (11, 32, 53)
# How often a picture has one, two or three objects.
OBJECT_COUNTS = {1: 0.4, 2: 0.4, 3: 0.2}

# Never trained on: these pairs, and one in ten combinations of two or three objects.
UNSEEN_PAIRS = frozenset(
    {
        ("red", "star"),
        ("orange", "square"),
        ("green", "triangle"),
        ("blue", "cross"),
        ("purple", "diamond"),
        ("white", "circle"),
    }
)
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a picture.

    Attributes:
        cell (`int`): Index into `CELLS`, row by row.
        colour, shape, size (`str`)
        jitter (`tuple[int, int]`): Pixels to the right and down from the centre of its cell.
    """

    cell: int
    colour: str
    shape: str
    size: str
    jitter: tuple[int, int] = (0, 0)

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3

    @property
    def centre(self) -> tuple[int, int]:
        """Pixels from the left and from the top."""
        return CENTRES[self.column] + self.jitter[0], CENTRES[self.row] + self.jitter[1]


@dataclass(frozen=True)
class Scene:
    """What a picture shows: objects in reading order, no two of one colour and shape, none of the background's colour."""

    background: str
    things: tuple[Thing, ...]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted(thing.pair for thing in self.things))


def is_held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the test set."""
    if any(pair in UNSEEN_PAIRS for pair in scene.pairs):
        return True
    if len(scene.things) == 1:
        return False
    name = ",".join(" ".join(pair) for pair in scene.pairs)
    return int(hashlib.md5(name.encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT_SHARE


def random_scene(generator: random.Random, held_out: bool, num_things: int | None = None) -> Scene:
    """A scene of the training set, or of the test set."""
    while True:
        count = num_things or generator.choices(list(OBJECT_COUNTS), list(OBJECT_COUNTS.values()))[0]
        background = generator.choice(list(COLOURS))
        things: list[Thing] = []
        for cell in generator.sample(range(len(CELLS)), count):
            things.append(random_thing(generator, background, things, cell))
        scene = Scene(background, tuple(sorted(things)))
        if is_held_out(scene) == held_out:
            return scene


def random_thing(generator: random.Random, background: str, others: list[Thing], cell: int) -> Thing:
    """An object that can stand in a cell beside others."""
    taken = {other.pair for other in others}
    while True:
        colour = generator.choice([name for name in COLOURS if name != background])
        shape = generator.choice(SHAPES)
        if (colour, shape) not in taken:
            return placed(generator, cell, colour, shape, generator.choice(list(SIZES)))


def placed(generator: random.Random, cell: int, colour: str, shape: str, size: str) -> Thing:
    """An object with a jitter of its own."""
    reach = JITTER[size]
    return Thing(cell, colour, shape, size, (generator.randint(-reach, reach), generator.randint(-reach, reach)))


def outline(shape: str, centre: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    """Corners of a shape; a circle is a polygon of many."""
    x, y = centre

    def around(corners: int, start: float, *radii: float) -> list[tuple[float, float]]:
        angles = [start + 2 * math.pi * corner / corners for corner in range(corners)]
        return [
            (x + radii[index % len(radii)] * math.cos(angle), y + radii[index % len(radii)] * math.sin(angle))
            for index, angle in enumerate(angles)
        ]

    if shape == "circle":
        return around(48, 0, 0.95 * radius)
    if shape == "square":
        return around(4, math.pi / 4, 1.2 * radius)
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + 0.8 * radius), (x - radius, y + 0.8 * radius)]
    if shape == "diamond":
        return around(4, 0, 0.75 * radius, 1.05 * radius)
    if shape == "star":
        return around(10, -math.pi / 2, 1.1 * radius, 0.45 * radius)
    if shape == "cross":
        arm = 0.34 * radius
        corners = [(arm, radius), (arm, arm), (radius, arm), (radius, -arm), (arm, -arm), (arm, -radius)]
        return [(x + dx, y + dy) for dx, dy in corners] + [(x - dx, y - dy) for dx, dy in corners]
    raise ValueError(f"`shape` must be one of {', '.join(SHAPES)}, got {shape!r}.")


def render(scene: Scene, scale: int = 4) -> PIL.Image.Image:
    """The picture of a scene, 64 x 64.

    Args:
        scene ([`Scene`])
        scale (`int`, defaults to 4): Pixels drawn for one, so that edges are smooth.
    """
    canvas = PIL.Image.new("RGB", (SIDE * scale, SIDE * scale), COLOURS[scene.background])
    draw = PIL.ImageDraw.Draw(canvas)
    for thing in scene.things:
        x, y = thing.centre
        corners = outline(thing.shape, (x * scale, y * scale), SIZES[thing.size] * scale)
        draw.polygon(corners, fill=COLOURS[thing.colour])
    return canvas.reduce(scale)
