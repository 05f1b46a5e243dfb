# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a repository says and the original layout cannot: found by reading back what would be written."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safe_files import read_json_object

from diffusers_bagel.loading import check_saved_vae, vae_config
from transformers_bagel import BagelConfig, BagelProcessor
from transformers_bagel.original_config import read_original_config
from transformers_bagel.stored_tensors import StoredTensor


# Of configurations: where and by what they were written, and what is a fact about files that are beside them.
BESIDE = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "transformers_weights")
# What the original code has in itself, whatever its JSON says.
IN_THE_CODE = {
    "frequency_embedding_size": 256,
    "tie_word_embeddings": False,
    "visual_gen": True,
    "visual_und": True,
    "text_config": {"rope_parameters": {"rope_type": "default"}, "tie_word_embeddings": False},
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def differences(what: str, said: Mapping[str, Any], read: Mapping[str, Any]) -> Iterator[str]:
    """
    The entries of settings that are read back otherwise.

    Args:
        what (`str`): Whose settings they are.
        said, read (`Mapping[str, Any]`): Settings; keys that begin with an underscore do not count.
    """
    for key in sorted(said.keys() | read.keys()):
        one, other = (plain(settings.get(key)) for settings in (said, read))
        if one == other or key.startswith("_") or key in BESIDE:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            yield from differences(f"{what}, {key}", one, other)
        else:
            yield f"{what}: {key} is {one!r}, and would be {other!r}"


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def lost_settings(config: BagelConfig, folder: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """
    Args:
        config ([`BagelConfig`])
        folder (`Path`): With the original JSON files and the tokenizer.
        shapes (`dict[str, tuple[int, ...]]`): Of the weights, by name.
    """
    original = read_json_object(folder / "config.json")
    said, read = config.to_dict(), BagelConfig.from_dict(read_original_config(original, folder, shapes)).to_dict()
    yield from differences("config.json", said, read)
    yield from differences("config.json", within(said, IN_THE_CODE), IN_THE_CODE)
    if getattr(config, "quantization_config", None) is not None:
        yield "config.json: the weights are quantised"


def within(said: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of settings that others have, too."""
    return {
        key: within(said.get(key) or {}, value) if isinstance(value, dict) else said.get(key)
        for key, value in keys.items()
    }


def lost_weights(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    for table in ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"):
        if table not in tensors:
            yield f"{table} is missing, which the original code does not compute when it loads"
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            yield f"{name} is of {tensor.dtype}: the weights are quantised"
            return


def lost_processor(said: BagelProcessor, read: BagelProcessor) -> Iterator[str]:
    yield from differences("image processor", said.image_processor.to_dict(), read.image_processor.to_dict())
    if said.chat_template != read.chat_template:
        yield "the chat template is not BAGEL's own"
    if said.tokenizer.get_vocab() != read.tokenizer.get_vocab():
        yield "the tokenizer has other tokens than its files of the original layout"


def lost_scheduler(file: Path | None) -> Iterator[str]:
    """Of a `scheduler_config.json`, if there is one. The original code has its scheduler in itself (original behaviour,
    point 19)."""
    if file is None:
        return
    said = read_json_object(file)
    name = FlowMatchEulerDiscreteScheduler.__name__
    if said.get("_class_name") != name:
        yield f"scheduler: it is a {said.get('_class_name')}, and would be a {name}"
        return
    known = defaults(FlowMatchEulerDiscreteScheduler)
    yield from differences("scheduler", known | said, known | {"shift": 3.0})


def lost_vae(folder: Path, tensors: tuple[StoredTensor, ...]) -> Iterator[str]:
    """
    Args:
        folder (`Path`): In diffusers' layout.
        tensors (`tuple[StoredTensor, ...]`): Its tensors, by their original names.

    Raises:
        OSError, ValueError: if it is not whole.
    """
    try:
        read = vae_config({tensor.name: tensor for tensor in tensors})  # type: ignore[misc]  # only shapes are read
    except (KeyError, IndexError) as error:
        yield f"VAE: its tensors are not those of the original one ({error} is missing)"
        return
    said = read_json_object(folder / "config.json")
    # diffusers cuts tiles by it, and nothing else.
    beside = {"sample_size": None}
    known = defaults(AutoencoderKL)
    found = list(differences("VAE", known | said | beside, known | read | beside))
    if not found:
        check_saved_vae(folder)
    yield from found


def defaults(cls: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
