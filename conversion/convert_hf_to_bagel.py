# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Turn a repository of this package back into the published layout, for the published code.

    python conversion/convert_hf_to_bagel.py bagel published

SRC is a folder or a Hub id, flat or in diffusers' layout. DST gets `ema.safetensors` with its index, `ae.safetensors`, the
published JSON files and the tokenizer. Every tensor is what it was, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert_bagel_to_hf import SPARE_BYTES
from huggingface_hub import snapshot_download
from published_files import DESCRIPTIONS, INDEX, VAE, WHICH, tensors_of
from safe_files import StoredTensor, file_inside, stored_tensors
from streaming import Shard, check_room, whole_folder, write_json, write_shard
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from transformers_bagel import BagelConfig
from transformers_bagel.published_bagel import PUBLISHED_KEYS


VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="folder or Hub id of a repository of this package")
    parser.add_argument("dst", type=Path, help="folder to write")
    parser.add_argument("--revision", help="branch, tag or commit of SRC on the Hub")
    args = parser.parse_args(arguments)
    try:
        convert_back(args.src, args.dst, args.revision)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert_back(src: str, dst: Path, revision: str | None = None) -> None:
    """
    See the module's docstring.

    Raises:
        OSError, ValueError: before anything is written, if the repository is broken or incomplete, or if DST is taken
            or the disk is full.
    """
    folder, root = opened(src, revision)
    in_parts = (folder / "transformer" / "config.json").exists()
    model_folder, processor_folder = (folder / "transformer", folder / "processor") if in_parts else (folder, folder)
    config_file = file_inside(root, "config.json", model_folder)
    config = BagelConfig.from_pretrained(config_file.parent)
    model = Shard(WHICH["ema"], tuple(tensors_of(tuple(model_files(model_folder, root))).values()))
    vae = Shard(VAE, tuple(vae_tensors(file_inside(root, VAE_WEIGHTS, folder / "vae"))))
    check_room(dst, model.num_bytes + vae.num_bytes + SPARE_BYTES)
    with whole_folder(dst) as unfinished:
        with tqdm(total=model.num_bytes + vae.num_bytes, desc="Weights", unit="B", unit_scale=True) as progress:
            for shard in (model, vae):
                write_shard(shard, unfinished, progress)
        weight_map = {tensor.name: model.name for tensor in model.tensors}
        write_json(unfinished / INDEX, {"metadata": {"total_size": model.num_bytes}, "weight_map": weight_map})
        settings = published_settings(json.loads(config_file.read_text(encoding="utf-8")), config)
        write_json(unfinished / "config.json", settings)
        for key in ("llm_config", "vit_config"):
            write_json(unfinished / f"{key}.json", settings[key])
        for name in DESCRIPTIONS:
            # What the published layout spells in its own way is written above.
            if (processor_folder / name).exists() and name not in (
                "config.json",
                "llm_config.json",
                "vit_config.json",
            ):
                shutil.copyfile(file_inside(root, name, processor_folder), unfinished / name)
        if not (unfinished / "vocab.json").exists():
            # The published code takes the tokenizer from these two.
            AutoTokenizer.from_pretrained(unfinished).backend_tokenizer.model.save(str(unfinished))


def opened(src: str, revision: str | None) -> tuple[Path, Path]:
    """The folder of a repository, and what its files must lie in."""
    if Path(src).is_dir():
        return Path(src), Path(src)
    # A snapshot holds links into the folder of its repository.
    snapshot = Path(snapshot_download(src, revision=revision))
    return snapshot, snapshot.parent.parent


def model_files(folder: Path, root: Path) -> list[Path]:
    """All shards of the model, in order."""
    names = ["model.safetensors"]
    if (folder / INDEX).exists():
        index = json.loads(file_inside(root, INDEX, folder).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    return [file_inside(root, name, folder) for name in names]


# diffusers' names of the VAE's layers, and the published ones.
VAE_RENAMINGS = (
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r".\1.\2.block.\3."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def vae_tensors(file: Path) -> list[StoredTensor]:
    """The VAE's tensors under their published names, in the order of the published file: by name."""
    tensors = stored_tensors(file)
    levels = 1 + max(int(tensor.name.split(".")[2]) for tensor in tensors if ".up_blocks." in tensor.name)
    return sorted((published_vae_tensor(tensor, levels) for tensor in tensors), key=lambda tensor: tensor.name)


def published_vae_tensor(tensor: StoredTensor, levels: int) -> StoredTensor:
    name, shape = tensor.name, tensor.shape
    for pattern, replacement in VAE_RENAMINGS:
        name = re.sub(pattern, replacement, name)
    # The published decoder counts its levels from the picture's side.
    name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)
    if ".attn_1." in name and len(shape) == 2:
        # The published projections are convolutions of one pixel.
        shape = (*shape, 1, 1)
    return replace(tensor, name=name, shape=shape)


def published_settings(written: dict[str, Any], config: BagelConfig) -> dict[str, Any]:
    """The published `config.json` of a configuration; what was kept of the original is taken over."""
    text, vision = (config.to_dict()[key] for key in ("text_config", "vision_config"))
    kept = {key: written[key] for key in PUBLISHED_KEYS if key in written}
    # The published code builds one layer fewer than this number.
    vision["num_hidden_layers"] += 1
    # The published code is written for a library that has it at this place.
    text["rope_theta"] = text["rope_parameters"]["rope_theta"]
    return {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": config.model_type,
        "visual_gen": config.visual_gen,
        "visual_und": config.visual_und,
        "llm_config": text | {"model_type": "qwen2", "layer_module": "Qwen2MoTDecoderLayer"},
        "vit_config": vision | {"model_type": "siglip_vision_model"},
        "vae_config": {"z_channels": config.latent_channels, "downsample": config.latent_downsample},
        **kept,
        "interpolate_pos": config.interpolate_pos,
        "timestep_shift": config.timestep_shift,
        "vit_max_num_patch_per_side": config.vit_max_num_patch_per_side,
        "latent_patch_size": config.latent_patch_size,
        "max_latent_size": config.max_latent_size,
        "connector_act": config.connector_act,
    }


if __name__ == "__main__":
    sys.exit(main())
