# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The configuration of the original layout: its JSON files state some facts wrongly, its tensors and its tokenizer do not.

Source: original behaviour, points 6, 10, 11 and 13.
"""

from __future__ import annotations

import math
import os
from typing import Any

from .checkpoints import count_matches, json_value, read_json
from .errors import shown
from .files import find_file
from .loading import special_token_ids
from .weights import find_shapes


# Keys of the original config.json that this package spells differently.
ORIGINAL_KEYS = ("llm_config", "vit_config", "vae_config")

# The side of the latent table in the JSON of the original checkpoint (original behaviour, point 10).
WRONG_LATENT_SIDE = 32

# Entries of the original llm_config and vit_config that describe other classes than ours.
_FOREIGN_KEYS = ("model_type", "architectures", "transformers_version", "layer_module", "_name_or_path", "auto_map")


def is_original_config(config_dict: dict[str, Any]) -> bool:
    """Whether a `config.json` has the keys of the original layout instead of this package's."""
    return "text_config" not in config_dict and any(key in config_dict for key in ORIGINAL_KEYS)


def rename_original_keys(original: dict[str, Any]) -> dict[str, Any]:
    """Turn `llm_config`, `vit_config` and `vae_config` into this package's configuration arguments.

    The original loader drops the last ViT layer that `vit_config` counts, and so does this function.
    """
    renamed: dict[str, Any] = {}
    for key in ORIGINAL_KEYS:
        if not isinstance(original.get(key) or {}, dict):
            raise ValueError(f"`{key}` must be an object, got {shown(original[key])}.")
    if (llm_config := original.get("llm_config")) is not None:
        layer_module = llm_config.get("layer_module", "Qwen2MoTDecoderLayer")
        if layer_module != "Qwen2MoTDecoderLayer":
            raise ValueError(
                f"`llm_config.layer_module` must be 'Qwen2MoTDecoderLayer', got {shown(layer_module)}: this package "
                "implements the Mixture-of-Transformers layer only."
            )
        renamed["text_config"] = _own_keys(llm_config)
    if (vit_config := original.get("vit_config")) is not None:
        vision_config = _own_keys(vit_config)
        if isinstance(layers := vision_config.get("num_hidden_layers"), int):
            vision_config["num_hidden_layers"] = layers - 1
        renamed["vision_config"] = vision_config
    vae_config = original.get("vae_config") or {}
    for original_key, key in (("z_channels", "latent_channels"), ("downsample", "latent_downsample")):
        if original_key in vae_config:
            renamed[key] = vae_config[original_key]
    return renamed


def read_original_config(
    config_dict: dict[str, Any],
    path: str | os.PathLike,
    shapes: dict[str, tuple[int, ...]] | None = None,
    tokenizer: tuple[str | os.PathLike, dict[str, Any]] | None = None,
    **hub: Any,
) -> dict[str, Any]:
    """
    Rename the keys of an original `config.json` and correct its values from the files beside it.

    Args:
        config_dict (`dict`): The parsed `config.json`; it is left as it is.
        path (`str`), hub: The directory, or the Hub id, that it comes from; see [`hub_arguments`].
        shapes (`dict[str, tuple[int, ...]]`, *optional*): Of the weights, by name; by default of those beside it.
        tokenizer (`tuple`, *optional*): Where that is, if it is elsewhere: a path and its Hub arguments.

    Raises:
        OSError: if the Hub cannot be asked, or if a file of weights is truncated.
    """
    config_dict = dict(config_dict)
    original = {key: config_dict.pop(key, None) for key in ORIGINAL_KEYS}
    for key in ("llm_config", "vit_config"):
        json_value(original, key, dict, os.path.join(path, "config.json"))
        if original[key] is None and (file := find_file(path, f"{key}.json", **hub)) is not None:
            original[key] = read_json(file)
    config_dict |= rename_original_keys(original)
    text_config = config_dict.setdefault("text_config", {})
    vision_config = config_dict.setdefault("vision_config", {})

    tokenizer_path, tokenizer_hub = tokenizer or (path, hub)
    token_ids = special_token_ids(tokenizer_path, **tokenizer_hub)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key in token_ids:
            text_config[key] = token_ids.pop(key)
    config_dict |= token_ids

    if shapes is None:
        weights, shapes = find_shapes(path, hub)
        if weights is not None:
            config_dict["transformers_weights"] = weights.name
    _correct_from_shapes(config_dict, text_config, vision_config, shapes)
    return config_dict


def correct_config(config: Any, path: str | os.PathLike, **hub: Any) -> None:
    """Correct a configuration that `AutoConfig` made of an original `config.json` without knowing where its files are, as
    [`read_original_config`] does. It is changed in place; values that somebody else has changed stay."""
    config_dict, config.original_config = config.original_config, None
    stated = {key: value for key, value in config_dict.items() if key not in ORIGINAL_KEYS}
    stated |= rename_original_keys(config_dict)
    right = read_original_config(config_dict, path, **hub)
    for part in ("text_config", "vision_config"):
        _set_changed(getattr(config, part), stated.pop(part, {}), right.pop(part))
    _set_changed(config, stated, right)


def corrections(original: dict[str, Any], config: Any) -> list[tuple[str, Any, Any]]:
    """What the original JSON says wrongly: the key, its value there, and the right one."""
    text, vision = config.get_text_config(), config.vision_config
    right = {
        "max_latent_size": config.max_latent_size,
        "vit_max_num_patch_per_side": config.vit_max_num_patch_per_side,
        "llm_config.num_hidden_layers": text.num_hidden_layers,
        "llm_config.vocab_size": text.vocab_size,
        "llm_config.bos_token_id": text.bos_token_id,
        "llm_config.eos_token_id": text.eos_token_id,
        # The original code builds one layer fewer than this number.
        "vit_config.num_hidden_layers": vision.num_hidden_layers + 1,  # type: ignore[union-attr]
        "vae_config.z_channels": config.latent_channels,
    }
    found = []
    for name, value in right.items():
        *parts, key = name.split(".")
        place = original.get(parts[0]) or {} if parts else original
        if key in place and place[key] != value:
            found.append((name, place[key], value))
    return found


def _set_changed(config: Any, stated: dict[str, Any], right: dict[str, Any]) -> None:
    defaults = type(config)()
    for key, value in right.items():
        if value != stated.get(key) and getattr(config, key, None) == stated.get(key, getattr(defaults, key, None)):
            setattr(config, key, value)
            if key == "num_hidden_layers" and hasattr(config, "layer_types"):
                config.layer_types = ["full_attention"] * value


def _correct_from_shapes(
    config_dict: dict[str, Any],
    text_config: dict[str, Any],
    vision_config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    # Only what a tensor of the right rank tells; what is wrong with the others is said when they are loaded.
    def side(name: str, axis: int = 0) -> int | None:
        return shapes[name][axis] if len(shapes.get(name, ())) == 2 else None

    if text_layers := count_matches(shapes, r"language_model\.model\.layers\.(\d+)\."):
        text_config["num_hidden_layers"] = text_layers
        norms = (".self_attn.q_norm.weight", ".self_attn.k_norm.weight")
        text_config["qk_norm"] = any(name.endswith(norms) for name in shapes)
    if vocab_size := side("language_model.model.embed_tokens.weight"):
        text_config["vocab_size"] = vocab_size
    if vision_layers := count_matches(shapes, r"vit_model\.vision_model\.encoder\.layers\.(\d+)\."):
        vision_config["num_hidden_layers"] = vision_layers
    if positions := side("vit_model.vision_model.embeddings.position_embedding.weight"):
        patch_size = vision_config.get("patch_size", 14)
        vision_config["image_size"] = math.isqrt(positions) * (patch_size if isinstance(patch_size, int) else 14)
    for name, key in (("latent_pos_embed", "max_latent_size"), ("vit_pos_embed", "vit_max_num_patch_per_side")):
        if positions := side(f"{name}.pos_embed"):
            config_dict[key] = math.isqrt(positions)
    if (
        shapes
        and "latent_pos_embed.pos_embed" not in shapes
        and config_dict.get("max_latent_size") == WRONG_LATENT_SIDE
    ):
        # Without the table nothing tells its side, and the original code has another in itself than the JSON says.
        del config_dict["max_latent_size"]
    if latent_dim := side("vae2llm.weight", axis=1):
        patch_size = config_dict.get("latent_patch_size", 2)
        if isinstance(patch_size, int) and patch_size:
            config_dict["latent_channels"] = latent_dim // patch_size**2
    if frequencies := side("time_embedder.mlp.0.weight", axis=1):
        config_dict["frequency_embedding_size"] = frequencies


def _own_keys(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _FOREIGN_KEYS}
