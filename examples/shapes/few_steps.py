# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Distil the shipped adapter of six steps from bagel-shapes: `python examples/shapes/few_steps.py --output_dir six`.

Killed and started again it goes on where it last saved.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from asking import DRAWING, EDITING
from dataset import write_dataset
from parts import CHECKPOINT


TRAIN = Path(__file__).parent.parent / "train_few_steps.py"
# Drawings of prompts that say everything or less, with plans, and edits.
SHARES = {"draw": 0.3, "think_and_draw": 0.3, "edit": 0.4}
SETTINGS = [
    *("--num_inference_steps", "6", "--teacher_steps", "4"),
    *("--teacher_guidance_scale", str(DRAWING["guidance_scale"])),
    *("--teacher_image_guidance_scale", str(EDITING["image_guidance_scale"])),
    *("--rank", "16", "--lora_targets", "gen", "--learning_rate", "2e-3", "--adam_weight_decay", "0"),
    *("--lr_scheduler", "cosine", "--lr_warmup_steps", "10", "--train_batch_size", "24", "--sdpa_backend", "math"),
    *("--checkpointing_steps", "25", "--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest"),
    *("--validation_steps", "0", "--cpu", "--mixed_precision", "no"),
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The adapter names it, so it is no path of one machine.
    shipped = os.path.relpath(CHECKPOINT)
    parser.add_argument("--checkpoint", default=shipped, help="a repository of this world, or the shipped one")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=12_000)
    args = parser.parse_args(arguments)
    data = Path(args.output_dir) / "samples.parquet"
    if not data.exists():
        write_dataset(data, 17, SHARES, args.samples)
    where = ["--pretrained_model_name_or_path", args.checkpoint, "--output_dir", args.output_dir]
    steps = ["--train_data_file", str(data), "--max_train_steps", str(args.steps)]
    subprocess.run([sys.executable, str(TRAIN), *where, *steps, *SETTINGS], check=True)


if __name__ == "__main__":
    main()
