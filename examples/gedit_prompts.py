# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Write GEdit-Bench, which is published as a data set, as prompts and pictures for `bagel bench gedit`.

python examples/gedit_prompts.py gedit
bagel bench gedit --prompts gedit/prompts.jsonl --out runs/gedit
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import load_dataset


FIELDS = ("key", "task_type", "instruction", "instruction_language")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write prompts.jsonl and the pictures")
    parser.add_argument("--dataset", default="stepfun-ai/GEdit-Bench", help="Hub id or folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    with (args.folder / "prompts.jsonl").open("w", encoding="utf-8") as prompts:
        for row in load_dataset(args.dataset, split="train"):
            name = f"{row['instruction_language']}-{row['key']}.png"
            # What the published script edits; `input_image_raw` is another one.
            row["input_image"].save(args.folder / name)
            fields = {field: row[field] for field in FIELDS} | {"input_image": name}
            prompts.write(json.dumps(fields, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
