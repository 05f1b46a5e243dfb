# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Writes conversations as a parquet file that the training scripts read."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from tasks import sample


# Of a part, which has no other keys than these and its image. Said here, since a column of nothing else has no type.
PART = {"type": "string", "text": "string"} | dict.fromkeys(("loss", "vae", "next_action"), "bool")
FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": List({key: Value(kind) for key, kind in PART.items()})}),
        "images": List({"bytes": Value("binary"), "path": Value("string")}),
    }
)


def write_dataset(path: Path, seed: int, shares: dict[str, float], num_samples: int) -> None:
    """Write samples of the tasks of a stage."""
    write_rows(path, (sample(seed, shares, index) for index in range(num_samples)))


def write_rows(path: Path, conversations: Iterable[list[dict[str, Any]]]) -> None:
    """Write a row a conversation, whole or not at all.

    `messages` have empty image parts; `images` holds the images in order, as PNG.
    """
    columns: dict[str, list[Any]] = {"messages": [], "images": []}
    for messages in conversations:
        parts = [part for message in messages for part in message["content"]]
        columns["images"].append([_encoded(part.pop("image")) for part in parts if "image" in part])
        columns["messages"].append(messages)
        for part in parts:
            # Rows of a table have the same keys.
            for key in PART:
                part.setdefault(key, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    Dataset.from_dict(columns, FEATURES).to_parquet(unfinished)
    os.replace(unfinished, path)


def _encoded(picture: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}
