# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a repository holds, and what of it would fit into this machine. No weights are downloaded, but those of a GGUF, whose
names and shapes stand at no fixed place in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from transformers_bagel import BagelConfig, BagelForConditionalGeneration
from transformers_bagel.checkpoints import read_json
from transformers_bagel.files import find_file
from transformers_bagel.original_config import corrections, is_original_config
from transformers_bagel.products import told_products

from .fitting import are_packed, free_bytes, needed_bytes, possible_ways, size


def describe(repository: str, device: torch.device) -> str:
    """
    Lines about a repository.

    Args:
        repository (`str`): A folder, or a Hub id.
        device (`torch.device`): That its weights would be on.

    Raises:
        OSError, ValueError: if it holds no BAGEL.
    """
    files = _files(repository)
    folder = "transformer" if "transformer/config.json" in files else ""
    config_file = find_file(repository, "config.json", **({"subfolder": folder} if folder else {}))
    if config_file is None:
        raise OSError(f"it has no config.json, but {', '.join(sorted(files)[:5]) or 'no files'}.")
    stated = read_json(config_file)
    config = BagelConfig.from_pretrained(repository, **({"subfolder": folder} if folder else {}))
    lines = [f"{repository}: {_layout(files, stated, folder)}"]
    weights = {name: count for name, count in files.items() if name.endswith((".safetensors", ".gguf", ".bin", ".pt"))}
    lines += [f"  {name}: {size(count)}" for name, count in sorted(weights.items())]
    lines += _about(config)
    if is_original_config(stated):
        wrong = corrections(stated, config)
        lines += [f"  corrected: {key} is {value}, and {right} by the files" for key, value, right in wrong]
    if getattr(config, "quantization_config", None) or getattr(config, "dfloat11_config", None):
        return "\n".join([*lines, "  loaded as they are, they take about what their files do"])
    packed = are_packed(repository, {"subfolder": folder} if folder else {}, config)
    return "\n".join([*lines, *_fits(config, device, packed)])


def _files(repository: str) -> dict[str, int]:
    if os.path.isdir(repository):
        paths = [path for path in Path(repository).rglob("*") if path.is_file()]
        return {path.relative_to(repository).as_posix(): path.stat().st_size for path in paths}
    siblings = HfApi().model_info(repository, files_metadata=True).siblings or []
    return {sibling.rfilename: sibling.size or 0 for sibling in siblings}


def _layout(files: dict[str, int], stated: dict[str, Any], folder: str) -> str:
    if is_original_config(stated):
        return "the original layout"
    if folder:
        return "the layout of diffusers, with a folder for each component"
    return "the layout of transformers" + (", flat: diffusers reads it, too" if "model_index.json" in files else "")


def _about(config: BagelConfig) -> Iterator[str]:
    with torch.device("meta"):
        model = BagelForConditionalGeneration(config)
    count = sum(parameter.numel() for parameter in model.state_dict().values())
    parts = " and ".join(word for word, has in (("sees", config.visual_und), ("draws", config.visual_gen)) if has)
    yield f"  {count:,} weights; it {parts or 'only talks'}"
    if config.few_steps is not None:
        yield f"  by default it draws in {config.few_steps.get('num_inference_steps')} steps, of an adapter that is in the weights"
    text, vision = config.get_text_config(), model.config.vision_config
    yield f"  {text.num_hidden_layers} layers of {text.hidden_size}, vision tower: {vision.num_hidden_layers} of {vision.hidden_size}"
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        yield f"  quantised: {method}"


def _fits(config: BagelConfig, device: torch.device, packed: bool) -> Iterator[str]:
    free = free_bytes(device)
    yield f"here, with {size(free)} free ({device.type}):"
    # What is packed in FP8 or a GGUF is unpacked, and not rounded again.
    for way in (way for way in possible_ways(device) if not (packed and way.layer_bytes)):
        uses = {"to draw": True, "to answer": False} if config.visual_gen else {"to answer": False}
        needs = {use: needed_bytes(config, way, draws) for use, draws in uses.items()}
        told = (f"{size(need)} {use}, {'fits' if need <= free else 'too much'}" for use, need in needs.items())
        yield f"  {way.name}: {'; '.join(told)}"
    if device.type == "cpu":
        yield f"  {told_products(config)}"
