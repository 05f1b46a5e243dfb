# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The model card of bagel-shapes, with what `evaluate.py` measured: `python examples/shapes/card.py results.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from parts import CHECKPOINT
from safetensors import safe_open


TEMPLATE = Path(__file__).with_name("card.md")
# Rows of the table: what they are called, and what they mean.
ROWS = {
    "draw_full": "prompts that say everything",
    "draw_without_plan": "ordinary prompts",
    "draw_with_plan": "ordinary prompts, `think=True`",
    "relation_without_plan": "two objects and how they stand to each other",
    "relation": "the same, `think=True`",
    "riddle_without_plan": "riddles",
    "riddle_with_plan": "riddles, `think=True`",
    "edit": "edits: the change made and the rest kept",
    "ask": "questions, answered word for word",
    "ask_with_thought": "questions, `think=True`",
    "riddle_answer": "riddles about a picture",
    "riddle_answer_with_thought": "riddles about a picture, `think=True`",
    "decides": "requests, answered with words and pictures in the right order",
    "steps": "steps: every picture right, and grown from the one before",
    "look_again": "questions about its own drawing",
    "describe": "objects of a picture described with size, colour, shape and place",
    "vae": "pictures after the VAE alone: the ceiling",
}
TASKS = {
    "describe": "image-to-text",
    "edit": "image-to-image",
    "ask": "visual-question-answering",
    "ask_with_thought": "visual-question-answering",
    "look_again": "visual-question-answering",
    "riddle_answer": "visual-question-answering",
    "riddle_answer_with_thought": "visual-question-answering",
}


def num_parameters(checkpoint: Path) -> int:
    total = 0
    for file in [*checkpoint.glob("*.safetensors"), *checkpoint.glob("vae/*.safetensors")]:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # a file, not a dict
                count = 1
                for side in weights.get_slice(name).get_shape():
                    count *= side
                total += count
    return total


def card(checkpoint: Path, results: dict[str, float]) -> ModelCard:
    """The card of a checkpoint with what `evaluate.py` measured."""
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="any-to-any",
        license="apache-2.0",
        language="en",
        tags=["bagel", "text-to-image", "image-to-image", "image-text-to-text", "transformers", "tiny-model"],
        model_name="bagel-shapes",
        eval_results=[
            EvalResult(
                task_type=TASKS.get(name, "text-to-image"),
                dataset_type="bagel-shapes",
                dataset_name="bagel-shapes, held-out scenes",
                metric_type="accuracy",
                metric_name=meaning,
                metric_value=results[name],
            )
            for name, meaning in ROWS.items()
        ],
    )
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        rows=[(meaning, f"{results[name]:.1%}") for name, meaning in ROWS.items()],
        results=results,
        parameters=f"{num_parameters(checkpoint) / 1e6:.1f}",
        megabytes=f"{size / 1e6:.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="what evaluate.py wrote")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    card(args.checkpoint, results).save(args.checkpoint / "README.md")


if __name__ == "__main__":
    main()
