# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a repository needs for `trust_remote_code=True`, which loads it before anybody has imported this package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from streaming import write_json


CODE = Path(__file__).with_name("repository_code")
# Auto class -> file and class, by the file that names them.
AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "modeling_bagel.BagelConfig",
        "AutoModel": "modeling_bagel.BagelModel",
        "AutoModelForCausalLM": "modeling_bagel.BagelForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_bagel.BagelForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_bagel.BagelForConditionalGeneration",
    },
    "processor_config.json": {"AutoProcessor": "modeling_bagel.BagelProcessor"},
}
# The file of the pipeline, and libraries that diffusers knows: it looks the components up before it runs that file.
MODEL_INDEX = {
    "_class_name": ["pipeline", "BagelPipeline"],
    "processor": ["transformers", "BagelProcessor"],
    "transformer": ["transformers", "BagelForConditionalGeneration"],
}


def write_remote_code(folder: Path) -> None:
    """Complete a flat repository by files that import this package, and name them in the settings of the libraries.

    Args:
        folder (`Path`): With `config.json`, `processor_config.json` and `model_index.json`.
    """
    for file in sorted(CODE.glob("*.py")):
        shutil.copyfile(file, folder / file.name)
    for name, auto_map in AUTO_MAPS.items():
        update_json(folder / name, {"auto_map": auto_map})
    update_json(folder / "model_index.json", MODEL_INDEX)


def update_json(file: Path, entries: Mapping[str, object]) -> None:
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | entries)
