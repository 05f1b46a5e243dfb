# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The tasks of bagel-shapes as a data set of VLMEvalKit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from shapes_tasks import is_right
from vlmeval.dataset import ImageBaseDataset
from vlmeval.smp import load


class ShapesDataset(ImageBaseDataset):
    """Items of one task, from `NAME.jsonl` in the working folder."""

    TYPE = "VQA"

    def load_data(self, dataset: str) -> pd.DataFrame:
        lines = Path(f"{dataset}.jsonl").read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines]
        rows = [{"index": item["index"], "question": item["question"], "item": json.dumps(item)} for item in items]
        paths = [item["images"][0] for item in items if item["images"]]
        return pd.DataFrame(rows) if not paths else pd.DataFrame(rows).assign(image_path=paths)

    def evaluate(self, eval_file: str, **judge: Any) -> dict[str, float]:
        right = judged(load(eval_file))
        return {"right": sum(right) / len(right)}


def judged(table: pd.DataFrame) -> list[bool]:
    """Of each row of a file of predictions, whether it is right."""
    return [is_right(json.loads(row["item"]), str(row["prediction"])) for _, row in table.iterrows()]
