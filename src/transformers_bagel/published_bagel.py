# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The published repository layout, read as it is: its JSON files state some facts wrongly, its tensors do not.

Sources: published behaviour, points 6, 10, 11 and 13. What the weights and the tokenizer say wins over the JSON.
"""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

import huggingface_hub
from transformers.utils import cached_file

from .safetensors_bagel import read_shapes
from .segments import SPECIAL_TOKENS


# Names of the published config.json that this package spells differently.
PUBLISHED_KEYS = ("llm_config", "vit_config", "vae_config")

# Entries of the published llm_config and vit_config that describe other classes than ours.
_FOREIGN_KEYS = ("model_type", "architectures", "transformers_version", "layer_module", "_name_or_path", "auto_map")

WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors", "ema.safetensors")


def is_published_config(config_dict: dict[str, Any]) -> bool:
    """Whether a `config.json` has the published keys instead of this package's."""
    return "text_config" not in config_dict and any(key in config_dict for key in PUBLISHED_KEYS)


def has_published_parts(path: str | os.PathLike, **hub_kwargs: Any) -> bool:
    """Whether a directory or repository has the published configuration of the language model in a file of its own."""
    return _find(path, "llm_config.json", **hub_kwargs) is not None


def rename_published_keys(published: dict[str, Any]) -> dict[str, Any]:
    """Turn `llm_config`, `vit_config` and `vae_config` into this package's configuration arguments.

    The published loader drops the last ViT layer that `vit_config` counts, and so does this function.
    """
    renamed: dict[str, Any] = {}
    if (llm_config := published.get("llm_config")) is not None:
        layer_module = llm_config.get("layer_module", "Qwen2MoTDecoderLayer")
        if layer_module != "Qwen2MoTDecoderLayer":
            raise ValueError(
                f"`llm_config.layer_module` must be 'Qwen2MoTDecoderLayer', got {layer_module!r}: this package "
                "implements the Mixture-of-Transformers layer only."
            )
        renamed["text_config"] = _own_keys(llm_config)
    if (vit_config := published.get("vit_config")) is not None:
        vision_config = _own_keys(vit_config)
        if "num_hidden_layers" in vision_config:
            vision_config["num_hidden_layers"] -= 1
        renamed["vision_config"] = vision_config
    vae_config = published.get("vae_config") or {}
    for published_key, key in (("z_channels", "latent_channels"), ("downsample", "latent_downsample")):
        if published_key in vae_config:
            renamed[key] = vae_config[published_key]
    return renamed


def correct_published_config(
    config_dict: dict[str, Any],
    path: str | os.PathLike,
    shapes: dict[str, tuple[int, ...]] | None = None,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """Rename the keys of a published `config.json` and correct its values from the files beside it.

    Args:
        config_dict (`dict`): The parsed `config.json`.
        path (`str`): The directory, or the Hub id, that it comes from.
        shapes (`dict[str, tuple[int, ...]]`, *optional*): Of the weights, by name; by default of those beside it.
        hub_kwargs: `revision`, `token`, `cache_dir`, `subfolder` of the download.
    """
    config_dict = dict(config_dict)
    published = {key: config_dict.pop(key, None) for key in PUBLISHED_KEYS}
    for key in ("llm_config", "vit_config"):
        if published[key] is None and (file := _find(path, f"{key}.json", **hub_kwargs)) is not None:
            published[key] = _read_json(file)
    config_dict |= rename_published_keys(published)
    text_config = config_dict.setdefault("text_config", {})
    vision_config = config_dict.setdefault("vision_config", {})

    token_ids = read_special_token_ids(path, **hub_kwargs)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key in token_ids:
            text_config[key] = token_ids.pop(key)
    config_dict |= token_ids

    if shapes is None:
        weight_file = next((file for file in WEIGHT_FILES if _find(path, file, **hub_kwargs) is not None), None)
        if weight_file is None:
            return config_dict
        if weight_file == "ema.safetensors":
            config_dict["transformers_weights"] = weight_file
        shapes = _read_shapes(path, weight_file, **hub_kwargs)
    _correct_from_shapes(config_dict, text_config, vision_config, shapes)
    return config_dict


def read_special_token_ids(path: str | os.PathLike, **hub_kwargs: Any) -> dict[str, int]:
    """Ids of BAGEL's special tokens, found by name in the tokenizer's files. Absent tokens are left out."""
    ids: dict[str, int] = {}
    if (file := _find(path, "tokenizer_config.json", **hub_kwargs)) is not None:
        for token_id, token in _read_json(file).get("added_tokens_decoder", {}).items():
            ids[token["content"]] = int(token_id)
    if (file := _find(path, "tokenizer.json", **hub_kwargs)) is not None:
        tokenizer = _read_json(file)
        for token in tokenizer.get("added_tokens", []):
            ids[token["content"]] = token["id"]
    elif (file := _find(path, "vocab.json", **hub_kwargs)) is not None:
        ids = _read_json(file) | ids
    return {key: ids[token] for key, token in SPECIAL_TOKENS.items() if token in ids}


def _correct_from_shapes(
    config_dict: dict[str, Any],
    text_config: dict[str, Any],
    vision_config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    # Only what a tensor of the right rank tells; what is wrong with the others is said when they are loaded.
    def rows(name: str, axis: int = 0) -> int | None:
        return shapes[name][axis] if len(shapes.get(name, ())) == 2 else None

    text_layers = _count(shapes, r"language_model\.model\.layers\.(\d+)\.")
    if text_layers:
        text_config["num_hidden_layers"] = text_layers
        norms = [name for name in shapes if name.endswith((".self_attn.q_norm.weight", ".self_attn.k_norm.weight"))]
        text_config["qk_norm"] = bool(norms)
    if vocab_size := rows("language_model.model.embed_tokens.weight"):
        text_config["vocab_size"] = vocab_size
    vision_layers = _count(shapes, r"vit_model\.vision_model\.encoder\.layers\.(\d+)\.")
    if vision_layers:
        vision_config["num_hidden_layers"] = vision_layers
    if positions := rows("vit_model.vision_model.embeddings.position_embedding.weight"):
        vision_config["image_size"] = math.isqrt(positions) * vision_config.get("patch_size", 14)
    for name, key in (("latent_pos_embed", "max_latent_size"), ("vit_pos_embed", "vit_max_num_patch_per_side")):
        if positions := rows(f"{name}.pos_embed"):
            config_dict[key] = math.isqrt(positions)
    if latent_dim := rows("vae2llm.weight", axis=1):
        config_dict["latent_channels"] = latent_dim // config_dict.get("latent_patch_size", 2) ** 2
    if frequencies := rows("time_embedder.mlp.0.weight", axis=1):
        config_dict["frequency_embedding_size"] = frequencies


def _count(shapes: dict[str, tuple[int, ...]], pattern: str) -> int:
    return len({match.group(1) for name in shapes if (match := re.match(pattern, name))})


def _own_keys(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _FOREIGN_KEYS}


def _read_json(file: str | os.PathLike) -> dict[str, Any]:
    with open(file, encoding="utf-8") as stream:
        return json.load(stream)


def _find(path: str | os.PathLike, name: str, **hub_kwargs: Any) -> str | None:
    """Local path of a file of a directory or of a Hub repository; weights are looked up, never downloaded."""
    if os.path.isdir(path):
        file = os.path.join(path, hub_kwargs.get("subfolder") or "", name)
        return file if os.path.isfile(file) else None
    if name.endswith(".safetensors"):
        revision, token = hub_kwargs.get("revision"), hub_kwargs.get("token")
        in_cache = huggingface_hub.try_to_load_from_cache(
            str(path), name, cache_dir=hub_kwargs.get("cache_dir"), revision=revision
        )
        if isinstance(in_cache, str):
            return in_cache
        return name if huggingface_hub.file_exists(str(path), name, revision=revision, token=token) else None
    return cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_kwargs,
    )


def _read_shapes(path: str | os.PathLike, weight_file: str, **hub_kwargs: Any) -> dict[str, tuple[int, ...]]:
    files = [weight_file]
    if weight_file.endswith(".json"):
        index = _read_json(str(_find(path, weight_file, **hub_kwargs)))
        files = sorted(set(index["weight_map"].values()))
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files:
        file = _find(path, name, **hub_kwargs)
        if file is None:
            continue
        if os.path.isfile(file):
            shapes |= read_shapes(file)
        else:
            metadata = huggingface_hub.parse_safetensors_file_metadata(
                str(path), name, revision=hub_kwargs.get("revision"), token=hub_kwargs.get("token")
            )
            shapes |= {key: tuple(tensor.shape) for key, tensor in metadata.tensors.items()}
    return shapes
