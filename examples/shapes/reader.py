# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The judge: reads the scene off a picture by rules, with nothing learned."""

from __future__ import annotations

from functools import cache

import numpy as np
import PIL.Image
from scipy import ndimage
from world import CELLS, CENTRES, COLOURS, SHAPES, SIDE, SIZES, Scene, Thing, outline


PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
NAMES = list(COLOURS)
# A pixel belongs to an object if it is this far from the background's colour, in RGB: half the least distance of two.
FOREGROUND = 50.0
# Smaller specks are no objects; the smallest object has 60 pixels.
MIN_AREA = 10
# An object has one colour if this share of its inner pixels has it.
MIN_UNIFORM = 0.8
# Less alike than this, in intersection over union, is no shape at all.
MIN_OVERLAP = 0.6
# Wider than this a component is two objects that touch.
MAX_EXTENT = 23
MAX_SHIFT = 2


def read(image: PIL.Image.Image) -> Scene:
    """What a picture shows. What is not of this world has the shape or the colour `"unknown"`."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    background = _background(pixels)
    mask = np.linalg.norm(pixels - COLOURS[background], axis=-1) > FOREGROUND
    things = [_read_thing(pixels, component, background) for component in _components(mask)]
    return Scene(background, tuple(sorted(things)))


def _background(pixels: np.ndarray) -> str:
    """The commonest colour of the picture's border."""
    border = np.concatenate([pixels[:2], pixels[-2:], pixels[:, :2].swapaxes(0, 1), pixels[:, -2:].swapaxes(0, 1)])
    nearest = np.linalg.norm(border.reshape(-1, 1, 3) - PALETTE, axis=-1).argmin(-1)
    return NAMES[np.bincount(nearest, minlength=len(NAMES)).argmax()]


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Masks of the objects, `(height, width)` each."""
    labels, count = ndimage.label(mask)
    found = []
    for index, area in enumerate(ndimage.find_objects(labels), start=1):
        component = labels == index
        if max(side.stop - side.start for side in area) > MAX_EXTENT:
            cells = _nearest_cells()
            parts = [component & (cells == cell) for cell in range(len(CELLS))]
        else:
            parts = [component]
        found += [part for part in parts if part.sum() >= MIN_AREA]
    return found


def _read_thing(pixels: np.ndarray, mask: np.ndarray, background: str) -> Thing:
    inside = ndimage.binary_erosion(mask)
    core = pixels[inside if inside.any() else mask]
    colour = np.median(core, axis=0)
    is_uniform = (np.linalg.norm(core - colour, axis=-1) < FOREGROUND).mean() >= MIN_UNIFORM
    distances = np.linalg.norm(PALETTE - colour, axis=-1)
    name = NAMES[distances.argmin()] if is_uniform and distances.min() < FOREGROUND else "unknown"
    # The smooth edge belongs to whatever it is more like.
    sharp = mask & (np.linalg.norm(pixels - colour, axis=-1) < np.linalg.norm(pixels - COLOURS[background], axis=-1))
    rows, columns = np.nonzero(sharp if sharp.any() else mask)
    middle = ((rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2)
    cell = int(np.argmin([abs(middle[0] - y) + abs(middle[1] - x) for y in CENTRES for x in CENTRES]))
    shape, size = _shape(sharp, round(middle[0]), round(middle[1]))
    return Thing(cell, name, shape, size)


def _shape(mask: np.ndarray, row: int, column: int) -> tuple[str, str]:
    """Shape and size of the template that overlaps most with a mask around a pixel."""
    reach = SIDE // 4
    window = np.pad(mask, reach)[row : row + 2 * reach, column : column + 2 * reach]
    templates, keys = _templates(reach)
    overlap = (templates & window).sum((1, 2)) / (templates | window).sum((1, 2))
    best = int(overlap.argmax())
    return keys[best] if overlap[best] >= MIN_OVERLAP else ("unknown", keys[best][1])


@cache
def _nearest_cells() -> np.ndarray:
    """Cell of each pixel, `(height, width)`."""
    nearest = np.abs(np.arange(SIDE)[:, None] + 0.5 - np.array(CENTRES)).argmin(-1)
    return 3 * nearest[:, None] + nearest


@cache
def _templates(reach: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Masks of all shapes and sizes at small shifts, `(templates, 2 * reach, 2 * reach)`, and what they are."""
    masks, keys = [], []
    scale = 4
    for shape in SHAPES:
        for size, radius in SIZES.items():
            for dy in range(-MAX_SHIFT, MAX_SHIFT + 1):
                for dx in range(-MAX_SHIFT, MAX_SHIFT + 1):
                    canvas = PIL.Image.new("L", (2 * reach * scale, 2 * reach * scale))
                    corners = outline(shape, ((reach + dx) * scale, (reach + dy) * scale), radius * scale)
                    PIL.ImageDraw.Draw(canvas).polygon(corners, fill=255)
                    masks.append(np.asarray(canvas.reduce(scale)) > 127)
                    keys.append((shape, size))
    return np.stack(masks), keys
