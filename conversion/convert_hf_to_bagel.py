# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Turn a repository of this package back into the original layout, for the original code.

    python conversion/convert_hf_to_bagel.py bagel original

SRC is a folder or a Hub id, flat or in diffusers' layout. DST gets `ema.safetensors` with its index, `ae.safetensors`, the
original JSON files and the tokenizer. Every tensor is what it was, bit for bit.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from accelerate import init_empty_weights
from lost import lost_processor, lost_scheduler, lost_settings, lost_vae, lost_weights
from original_config import original_settings
from original_files import NEEDED_TOKENIZER, TOKENIZER, WHICH
from repositories import run
from safe_files import read_json_object
from sources import INDEX, Source, in_parts_or_flat, model_files, opened, tensors_of
from streaming import SPARE_BYTES, Shard, check_disk_space, free_folder, whole_folder, write_json, write_shard
from tqdm.auto import tqdm

from diffusers_bagel.loading import VAE_FILE
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.adapter_checks import SETTINGS_FILE
from transformers_bagel.checkpoints import check_layers, check_tensors
from transformers_bagel.stored_tensors import StoredTensor


VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="folder or Hub id of a repository of this package")
    parser.add_argument("dst", type=Path, help="folder to write")
    parser.add_argument("--revision", help="branch, tag or commit of SRC on the Hub")
    args = parser.parse_args(arguments)
    return run(convert_back, args)


def convert_back(src: str, dst: Path, revision: str | None = None) -> None:
    """
    See the module's docstring.

    Raises:
        OSError, ValueError: before anything is written, if the repository is broken or incomplete, says what the
            original layout cannot hold, or if DST is taken or the disk is full.
    """
    dst = free_folder(dst)
    source = opened(src, revision)
    model_folder, processor_folder = in_parts_or_flat(source.folder)
    config_file = source.present(f"{model_folder}config.json")
    config = BagelConfig.from_pretrained(config_file.parent)
    tensors = tensors_of(model_files(source, model_folder))
    check_layers(config, tensors, src)
    with init_empty_weights():
        model = BagelForConditionalGeneration(config)
    check_tensors(model, tensors, src)
    weights = Shard(WHICH["ema"], tuple(tensors.values()))
    vae = Shard(VAE_FILE, tuple(vae_tensors(source.present(VAE_WEIGHTS))))
    if not any(source.find(f"{processor_folder}{name}") for name in NEEDED_TOKENIZER):
        raise FileNotFoundError(f"'{src}' has neither {' nor '.join(NEEDED_TOKENIZER)}: its tokenizer is missing.")
    if source.find(f"{model_folder}{SETTINGS_FILE}") is not None:
        raise ValueError(
            f"'{src}' has an adapter, for which the original layout has no place. Merge it: merge_lora.py."
        )
    with tempfile.TemporaryDirectory() as name:
        small = Path(name)
        weight_map = dict.fromkeys(tensors, weights.name)
        write_json(small / INDEX, {"metadata": {"total_size": weights.num_bytes}, "weight_map": weight_map})
        settings = original_settings(read_json_object(config_file), config)
        for key in ("llm_config", "vit_config"):
            write_json(small / f"{key}.json", settings[key])
        write_json(small / "config.json", settings)
        processor = write_processor(source, processor_folder, small)
        # In diffusers' layout it is the model's.
        if (generation := source.find(f"{model_folder}generation_config.json")) is not None:
            shutil.copyfile(generation, small / generation.name)
        lost = [
            *lost_settings(config, small, {name: tensor.shape for name, tensor in tensors.items()}),
            *lost_weights(tensors),
            *lost_processor(processor, BagelProcessor.from_pretrained(small, trust_remote_code=False)),
            *lost_scheduler(source.find("scheduler/scheduler_config.json")),
            *lost_vae(source.present(VAE_WEIGHTS).parent, vae.tensors),
        ]
        if lost:
            raise ValueError(f"The original layout cannot hold what '{src}' says: {'; '.join(lost)}.")
        check_disk_space(dst, weights.num_bytes + vae.num_bytes + SPARE_BYTES)
        with whole_folder(dst) as unfinished:
            with tqdm(total=weights.num_bytes + vae.num_bytes, desc="Weights", unit="B", unit_scale=True) as progress:
                for shard in (weights, vae):
                    write_shard(shard, unfinished, progress)
            shutil.copytree(small, unfinished, dirs_exist_ok=True)


def write_processor(source: Source, folder: str, small: Path) -> BagelProcessor:
    """
    Write the tokenizer of a repository, and, if they are not those that the original code has in itself, its settings of
    images.

    Args:
        source (`Source`)
        folder (`str`): In it, such as `"processor/"`.
        small (`Path`): Folder to write to, with a `config.json` of the original layout.

    Returns:
        [`BagelProcessor`]: The repository's.
    """
    for name in ("preprocessor_config.json", *TOKENIZER):
        if (file := source.find(f"{folder}{name}")) is not None:
            shutil.copyfile(file, small / name)
    processor = BagelProcessor.from_pretrained(source.folder / folder, trust_remote_code=False)
    if not (small / "vocab.json").exists():
        # The original code takes the tokenizer from these two.
        processor.tokenizer.backend_tokenizer.model.save(str(small))
    written = BagelProcessor.from_pretrained(small, trust_remote_code=False)
    if written.image_processor.to_dict() != processor.image_processor.to_dict():
        processor.image_processor.save_pretrained(small)
        print("The images are of other sizes than those in the original code: preprocessor_config.json has them.")
    return processor


# diffusers' names of the VAE's layers, and the original ones.
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
    """The VAE's tensors under their original names, in the order of the original file: by name.

    Raises:
        ValueError: if it is none of BAGEL's kind.
    """
    tensors = tensors_of([file]).values()
    blocks = [re.match(r"decoder\.up_blocks\.(\d+)\.", tensor.name) for tensor in tensors]
    levels = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    if not levels:
        raise ValueError(f"'{file}' is no `AutoencoderKL`: it has no decoder.up_blocks.")
    return sorted((original_vae_tensor(tensor, levels) for tensor in tensors), key=lambda tensor: tensor.name)


def original_vae_tensor(tensor: StoredTensor, levels: int) -> StoredTensor:
    name, shape = tensor.name, tensor.shape
    for pattern, replacement in VAE_RENAMINGS:
        name = re.sub(pattern, replacement, name)
    # The original decoder counts its levels from the picture's side.
    name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)
    if ".attn_1." in name and len(shape) == 2:
        # The original projections are convolutions of one pixel.
        shape = (*shape, 1, 1)
    return replace(tensor, name=name, shape=shape)


if __name__ == "__main__":
    sys.exit(main())
