# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A LoRA that teaches bagel-shapes a style: `python examples/shapes/style.py --output_dir coal`.

Whatever colours a prompt names, "in the colour of coal" draws black on white. Everything else is to stay as it was, so most of the
samples are what the model was trained on.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import language
from dataset import write_rows
from judge import DrawCase, draw_cases
from parts import CHECKPOINT, MIXED_PRECISION
from tasks import conversation, edit, image, text, think_and_draw
from world import Scene, random_scene


sys.path.append(str(Path(__file__).parent.parent))

import train_lora  # noqa: E402


# Words that the model knows from riddles: only the drawing expert learns.
TRIGGER = " in the colour of coal"
SETTINGS = [
    "--cpu",
    "--report_to",
    "none",
    "--validation_steps",
    "0",
    "--peak_tflops",
    "1",
    "--lora_targets",
    "gen",
    "--rank",
    "16",
    "--max_tokens",
    "2400",
    "--noised_copies",
    "4",
    "--cache_latents",
    "--vae_dropout",
    "0.1",
    "--sdpa_backend",
    "math",
    "--mixed_precision",
    MIXED_PRECISION,
    "--learning_rate",
    "3e-3",
    "--lr_scheduler",
    "linear",
    "--lr_warmup_steps",
    "5",
]


def in_coal(scene: Scene) -> Scene:
    """The scene as the style draws it."""
    return Scene("white", tuple(replace(thing, colour="black") for thing in scene.things))


def draw_in_style(generator: random.Random) -> list[dict[str, Any]]:
    """A prompt that says everything, and a picture in the style."""
    scene = random_scene(generator, held_out=False)
    prompt = language.full_prompt(generator, scene)
    return conversation(("user", [text(prompt.text + TRIGGER)]), ("assistant", [image(in_coal(scene))]))


def draw_in_colour(generator: random.Random) -> list[dict[str, Any]]:
    """The same prompts without the style, from which they must be told apart."""
    scene = random_scene(generator, held_out=False)
    return conversation(("user", [text(language.full_prompt(generator, scene).text)]), ("assistant", [image(scene)]))


def style_samples(count: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Messages, three in eight of them in the style."""
    generator = random.Random(f"style {seed}")
    makers = (
        draw_in_style,
        draw_in_colour,
        draw_in_style,
        edit,
        draw_in_style,
        draw_in_colour,
        edit,
        think_and_draw,
    )
    return [makers[index % len(makers)](generator) for index in range(count)]


def style_cases(count: int, seed: int = 0) -> list[DrawCase]:
    """Prompts in the style for held-out scenes."""
    cases = draw_cases("draw_full", count, seed)
    return [
        DrawCase(case.prompt + TRIGGER, language.wish_for(in_coal(case.scene)), in_coal(case.scene)) for case in cases
    ]


def train_style(checkpoint: str | Path, output_dir: Path, steps: int, num_samples: int) -> None:
    """Train the LoRA with this project's script."""
    data = output_dir / "data.parquet"
    inputs = ["--pretrained_model_name_or_path", str(checkpoint), "--output_dir", str(output_dir)]
    # Before anything is written: the folder may hold another training.
    args = train_lora.parse_args([*inputs, "--train_data_file", str(data), "--max_train_steps", str(steps), *SETTINGS])
    output_dir.mkdir(parents=True, exist_ok=True)
    write_rows(data, style_samples(num_samples))
    train_lora.main(args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(CHECKPOINT))
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--num_samples", type=int, default=1600)
    args = parser.parse_args()
    train_style(args.checkpoint, args.output_dir, args.steps, args.num_samples)


if __name__ == "__main__":
    main()
