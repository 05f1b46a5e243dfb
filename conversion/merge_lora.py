# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Merge LoRAs into a repository, which then draws and answers by itself, without peft.

    python conversion/merge_lora.py bagel bagel-coal --loras coal --scales 0.8

SRC is a folder or a Hub id, flat or in diffusers' layout. A LoRA is a Hub id, a folder or a file, in diffusers' format or
peft's. Weights go from file to file, a layer at a time; sums are made in float32 and rounded once. DST has SRC's files.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from cards import known_facts, public_name
from huggingface_hub import ModelCardData
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from repositories import run, write_card
from safe_files import PICKLES, check_links, read_json_object
from sources import CARD, in_parts_or_flat, model_files, opened, tensors_of
from streaming import (
    FORMAT,
    SPARE_BYTES,
    Shard,
    check_disk_space,
    free_folder,
    read_tensor,
    whole_folder,
    write_json,
    write_shard,
)
from torch import nn
from tqdm.auto import tqdm

from diffusers_bagel import BagelPipeline
from diffusers_bagel.few_steps import SAMPLE_SIZE, FewSteps
from diffusers_bagel.lora import DIFFUSERS_PREFIX, lora_config
from transformers_bagel import BagelConfig, BagelForConditionalGeneration
from transformers_bagel.adapter_checks import fitting_adapter
from transformers_bagel.adapters import lora_parameters
from transformers_bagel.checkpoints import check_tensors, module_name
from transformers_bagel.errors import some
from transformers_bagel.stored_tensors import StoredTensor


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="folder or Hub id of a repository of this package")
    parser.add_argument("dst", type=Path, help="folder to write")
    parser.add_argument("--loras", nargs="+", required=True, help="folders, files or Hub ids")
    parser.add_argument("--scales", nargs="+", type=float, help="strength of each LoRA; by default 1")
    parser.add_argument(
        "--allow-missing-layers", action="store_true", help="whether LoRAs may lack layers that their settings name"
    )
    parser.add_argument("--revision", help="branch, tag or commit of SRC on the Hub")
    parser.add_argument("--repo-id", help="what the card calls the repository; by default the name of DST")
    args = parser.parse_args(arguments)
    args.scales = args.scales or [1.0] * len(args.loras)
    if not all(map(math.isfinite, args.scales)):
        parser.error(f"--scales must be finite, got {args.scales}.")
    if len(args.scales) != len(args.loras):
        parser.error(f"--scales must be one number for each LoRA: {len(args.loras)}, got {len(args.scales)}.")
    return run(merge, args)


def merge(
    src: str,
    dst: Path,
    loras: Sequence[str],
    scales: Sequence[float],
    revision: str | None = None,
    repo_id: str | None = None,
    allow_missing_layers: bool = False,
) -> None:
    """
    See the module's docstring.

    Raises:
        OSError, ValueError: before anything is written, if SRC or a LoRA is broken or does not fit, or if DST is taken
            or the disk is full.
    """
    dst = free_folder(dst)
    for lora in loras:
        if Path(lora).is_dir():
            check_links(Path(lora))
    source = opened(src, revision)
    source.fetch_all()
    folder, (model_folder, processor_folder) = source.folder, in_parts_or_flat(source.folder)
    config = BagelConfig.from_pretrained(source.present(f"{model_folder}config.json").parent)
    names = source.indexed(model_folder) or ["model.safetensors"]
    shards = [
        Shard(name, tuple(tensors_of([file]).values()), None, FORMAT)
        for name, file in zip(names, model_files(source, model_folder), strict=True)
    ]
    tensors = {module_name(tensor.name): tensor for shard in shards for tensor in shard.tensors}
    weights = {folder / model_folder / name for name in names}
    others = [
        source.path(str(file.relative_to(folder)))
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file not in weights and file.suffix not in PICKLES
    ]
    with init_empty_weights():
        model = BagelForConditionalGeneration(config)
    check_tensors(model, {tensor.name: tensor for shard in shards for tensor in shard.tensors}, src)
    layers, few_steps = adapted_layers(model, loras, scales, allow_missing_layers)
    settings = few_step_settings(few_steps, config, tensors)
    num_bytes = sum(shard.num_bytes for shard in shards)
    check_disk_space(dst, num_bytes + sum(file.stat().st_size for file in others) + SPARE_BYTES)

    def compute(tensor: StoredTensor) -> torch.Tensor | None:
        module, _, parameter = module_name(tensor.name).rpartition(".")
        layer = layers.get(module)
        if layer is None or (parameter == "bias" and not any(layer.lora_bias.values())):
            return None
        merged = merged_parameter(layer, module, parameter, tensors)
        if not merged.to(tensor.dtype).isfinite().all():
            raise ValueError(f"'{tensor.name}' with the LoRAs is beyond the numbers of {tensor.dtype}.")
        return merged

    with whole_folder(dst) as unfinished:
        for file in others:
            place = unfinished / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
        if settings != config.few_steps:
            file = unfinished / model_folder / "config.json"
            write_json(file, read_json_object(file) | {"few_steps": settings})
        with tqdm(total=num_bytes, desc="Weights", unit="B", unit_scale=True) as progress:
            for shard in shards:
                write_shard(shard, unfinished / model_folder, progress, compute)
        parts = [public_name(part) for part in (src, *loras)]
        write_card(
            unfinished,
            repo_id or dst.resolve().name,
            # The licence is that of SRC, if it has a card that tells.
            ModelCardData(base_model=parts, base_model_relation="merge", **known_facts(source.find(CARD)).metadata),
            shards,
            source=parts[0],
            merged=list(zip(parts[1:], scales, strict=True)),
            num_steps=None if settings is None else settings["num_inference_steps"],
            model_place=model_folder.rstrip("/"),
            processor_place=processor_folder.rstrip("/"),
        )
    print(f"{dst}: {len(layers)} layers with {', '.join(loras)}.")
    if settings is not None:
        print(f"By default it draws in {settings['num_inference_steps']} steps.")


def adapted_layers(
    model: BagelForConditionalGeneration, loras: Sequence[str], scales: Sequence[float], allow_missing_layers: bool
) -> tuple[dict[str, Any], dict[str, FewSteps]]:
    """The layers of peft of a model without weights, by name: they have the LoRAs' weights, and wait for their own. And how those
    LoRAs want to be drawn with that were made for few steps, by their sources.

    Raises:
        OSError, ValueError: if a LoRA is not there, or does not fit the model.
    """
    few_steps = {}
    for index, (lora, scale) in enumerate(zip(loras, scales, strict=True)):
        state_dict, metadata = BagelPipeline.lora_state_dict(lora, return_lora_metadata=True, use_safetensors=True)
        weights = {name.removeprefix(DIFFUSERS_PREFIX): tensor for name, tensor in state_dict.items()}
        own = FewSteps.from_metadata(metadata, f"'{lora}'")
        if own is not None and scale:
            few_steps[lora] = own
        config = lora_config(weights, metadata, None, f"'{lora}'")
        settings, weights = fitting_adapter(model, config, weights, f"'{lora}'", allow_missing_layers)
        weights = {name: tensor.float() for name, tensor in weights.items()}
        inject_adapter_in_model(settings, model, f"lora_{index}", state_dict=weights, low_cpu_mem_usage=True)
        model.load_state_dict(lora_parameters(weights, f"lora_{index}"), strict=False, assign=True)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for layer in layers.values():
        for index, scale in enumerate(scales):
            if f"lora_{index}" in layer.scaling:
                layer.scaling[f"lora_{index}"] *= scale
    return layers, few_steps


def few_step_settings(
    few_steps: Mapping[str, FewSteps], config: BagelConfig, tensors: Mapping[str, StoredTensor]
) -> dict[str, Any] | None:
    """What the configuration is to say of few steps: what the first LoRA says, or what it said. What does not fit is told.

    Args:
        few_steps (`dict[str, FewSteps]`): By the sources of the LoRAs.
        config ([`BagelConfig`]): Of SRC.
        tensors (`dict[str, StoredTensor]`): Of SRC, by name in the module tree.
    """
    for lora, own in few_steps.items():
        stored = {name: tensors[f"{name}.weight"] for name in own.base if f"{name}.weight" in tensors}
        if not own.is_of({name: tensor.read(0, SAMPLE_SIZE).tolist() for name, tensor in stored.items()}):
            print(f"'{lora}' was made for a model with other weights: its pictures may be worse.", file=sys.stderr)
    first = next(iter(few_steps), None)
    if len(few_steps) > 1:
        print(f"{some(few_steps)} were each made for few steps: those of '{first}' are taken.", file=sys.stderr)
    return config.few_steps if first is None else few_steps[first].merged()


def merged_parameter(layer: Any, module: str, parameter: str, tensors: dict[str, StoredTensor]) -> torch.Tensor:
    """
    A weight or bias with all LoRAs of its layer.

    Args:
        layer (`peft.tuners.lora.LoraLayer`): Around a layer without weights, as which it is left.
        module (`str`): Its name.
        parameter (`str`): `"weight"` or `"bias"`.
        tensors (`dict[str, StoredTensor]`): What is stored, by name in the module tree.

    Raises:
        ValueError: if the sum is not finite.
    """
    base = layer.get_base_layer()
    empty = dict(base.named_parameters())
    try:
        for name in empty:
            # LoRAs of one layer are summed before anything is rounded.
            stored = read_tensor(tensors[f"{module}.{name}"], torch.float32)
            setattr(base, name, nn.Parameter(stored, requires_grad=False))
        layer.merge(safe_merge=True, adapter_names=list(layer.scaling))
        return getattr(base, parameter).data
    finally:
        layer.merged_adapters.clear()
        for name, value in empty.items():
            setattr(base, name, value)


if __name__ == "__main__":
    sys.exit(main())
