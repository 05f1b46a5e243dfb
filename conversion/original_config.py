# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The original `config.json`: what it says, what is wrong with it, and how this package's settings are put in its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safe_files import read_json_object

from transformers_bagel import BagelConfig
from transformers_bagel.original_config import ORIGINAL_KEYS


def read_original(descriptions: dict[str, Path]) -> dict[str, Any]:
    """The original `config.json`, completed by the files of its parts.

    Raises:
        ValueError: if one of them holds no JSON object.
    """
    settings = read_json_object(descriptions["config.json"]) if "config.json" in descriptions else {}
    for key in ("llm_config", "vit_config"):
        if settings.get(key) is None and f"{key}.json" in descriptions:
            settings[key] = read_json_object(descriptions[f"{key}.json"])
    return settings


def original_settings(kept: dict[str, Any], config: BagelConfig) -> dict[str, Any]:
    """A whole original `config.json`.

    Args:
        kept (`dict[str, Any]`): A `config.json` whose original keys are taken over, as far as it has them.
        config ([`BagelConfig`]): What the others say.
    """
    text, vision = (config.to_dict()[key] for key in ("text_config", "vision_config"))
    # Readers older than transformers 5 know no `rope_parameters`.
    rope = {"rope_theta": text["rope_parameters"]["rope_theta"]} if text.get("rope_parameters") else {}
    # The original code builds one layer fewer than this number.
    vision["num_hidden_layers"] += 1
    return {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": config.model_type,
        "visual_gen": config.visual_gen,
        "visual_und": config.visual_und,
        "llm_config": text | rope | {"model_type": "qwen2", "layer_module": "Qwen2MoTDecoderLayer"},
        "vit_config": vision | {"model_type": "siglip_vision_model"},
        "vae_config": {"z_channels": config.latent_channels, "downsample": config.latent_downsample},
        **{key: kept[key] for key in ORIGINAL_KEYS if kept.get(key) is not None},
        "interpolate_pos": config.interpolate_pos,
        "timestep_shift": config.timestep_shift,
        "vit_max_num_patch_per_side": config.vit_max_num_patch_per_side,
        "latent_patch_size": config.latent_patch_size,
        "max_latent_size": config.max_latent_size,
        "connector_act": config.connector_act,
    }


def repository_settings(
    original: dict[str, Any], corrected: list[tuple[str, Any, Any]], config: BagelConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """
    A `config.json` with this package's settings, and beside them the original keys for engines that know BAGEL by them.

    Args:
        original (`dict[str, Any]`): See [`read_original`]; what it says is kept, but for
        corrected (`list[tuple[str, Any, Any]]`): see [`corrections`].
        config ([`BagelConfig`])
        dtype (`torch.dtype`): Of most of the weights.
    """
    kept = {key: dict(original[key]) for key in ORIGINAL_KEYS if original.get(key) is not None}
    for name, _, value in corrected:
        part, _, key = name.partition(".")
        if key:
            kept[part][key] = value
    config.architectures = ["BagelForConditionalGeneration"]
    config.dtype = dtype
    written = json.loads(config.to_json_string(use_diff=False))
    # Where the weights of the source were is nothing about those of the repository.
    written.pop("transformers_weights", None)
    complete = original_settings(kept, config)
    return written | {key: complete[key] for key in ORIGINAL_KEYS}
