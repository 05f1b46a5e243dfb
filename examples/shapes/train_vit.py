# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Stage 2: the tower that sees learns to say, at every patch, what stands in its cell."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from parts import IMAGE_SIDE, MIXED_PRECISION, VISION, image_processor
from stages import run_stage
from torch import nn
from world import CELLS, COLOURS, SHAPES, SIZES, Scene, random_scene, render

from transformers_bagel.modeling_bagel import BagelVisionModel


BATCH_SIZE = 48
# Per patch: the picture's background, and of the object in its cell, or 0 for none.
TAGS: dict[str, list[str | None]] = {
    "background": list(COLOURS),
    "colour": [None, *COLOURS],
    "shape": [None, *SHAPES],
    "size": [None, *SIZES],
}


class Tagger(nn.Module):
    """The tower with a linear head a tag, which are thrown away after the stage."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = BagelVisionModel(VISION)
        self.heads = nn.ModuleDict({name: nn.Linear(VISION.hidden_size, len(values)) for name, values in TAGS.items()})

    def forward(self, pixel_values: torch.Tensor, image_grid_hw: torch.Tensor) -> dict[str, torch.Tensor]:
        """`(patches, patch_dim)` -> for every tag `(patches, values)`."""
        features = self.vision_tower(pixel_values, image_grid_hw).last_hidden_state
        return {name: head(features) for name, head in self.heads.items()}


def tags(scene: Scene) -> dict[str, torch.Tensor]:
    """Of every patch, row by row, `(patches,)` each."""
    by_cell = {thing.cell: thing for thing in scene.things}
    patches_per_cell = IMAGE_SIDE // VISION.patch_size // 3
    found = {}
    for name, values in TAGS.items():
        if name == "background":
            cells = [values.index(scene.background)] * len(CELLS)
        else:
            cells = [values.index(getattr(by_cell.get(cell), name, None)) for cell in range(len(CELLS))]
        grid = torch.tensor(cells).view(3, 3)
        found[name] = grid.repeat_interleave(patches_per_cell, 0).repeat_interleave(patches_per_cell, 1).flatten()
    return found


def tagged_pictures(seed: int, count: int, held_out: bool = False) -> tuple[dict, dict[str, torch.Tensor]]:
    """Model inputs, and the tags of all patches."""
    generator = random.Random(f"vit {seed}")
    scenes = [random_scene(generator, held_out) for _ in range(count)]
    inputs = image_processor()([render(scene) for scene in scenes], return_tensors="pt")
    targets = [tags(scene) for scene in scenes]
    return inputs, {name: torch.cat([target[name] for target in targets]) for name in TAGS}


def train_vit(folder: Path, num_steps: int) -> BagelVisionModel:
    """The trained tower."""
    torch.manual_seed(0)
    tagger = Tagger()

    def losses(step: int) -> dict[str, torch.Tensor]:
        inputs, targets = tagged_pictures(step, BATCH_SIZE)
        with torch.autocast("cpu", torch.bfloat16, enabled=MIXED_PRECISION == "bf16"):
            scores = tagger(**inputs)
        parts = {name: nn.functional.cross_entropy(scores[name].float(), targets[name]) for name in TAGS}
        return {"loss": torch.stack(list(parts.values())).sum()} | parts

    heads = tuple(f"heads.{name}" for name in TAGS)
    run_stage(folder, tagger, losses, num_steps, learning_rate=2e-3, not_for_muon=heads)
    return tagger.vision_tower
