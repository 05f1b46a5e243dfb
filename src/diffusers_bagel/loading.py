# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The published repository layout: no `model_index.json`, and the VAE as `ae.safetensors`."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file
from transformers.utils import cached_file

from transformers_bagel.safetensors_bagel import read_shapes


VAE_FILE = "ae.safetensors"


def load_published_vae(path: str | os.PathLike, dtype: torch.dtype | None = None, **hub_kwargs: Any) -> AutoencoderKL:
    """The VAE of the published layout as diffusers' [`AutoencoderKL`].

    Args:
        path (`str`): Directory or Hub id.
        dtype (`torch.dtype`, *optional*): Of the weights; the file's by default.
        hub_kwargs: `revision`, `token`, `cache_dir` of the download.

    Raises:
        OSError: if the file is missing or truncated.
        ValueError: if it is not the VAE of BAGEL.
    """
    return vae_from_file(cached_file(path, VAE_FILE, **hub_kwargs), dtype)


def vae_from_file(file: str | os.PathLike, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """See [`load_published_vae`]."""
    # For its checks, whose errors name the file.
    read_shapes(file)
    weights = load_file(file)
    try:
        config = vae_config(weights)
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(config)
        converted = convert_ldm_vae_checkpoint(weights, config)
        used = {tensor.data_ptr() for tensor in converted.values()}
        if unknown := [name for name, tensor in weights.items() if tensor.data_ptr() not in used]:
            raise ValueError(f"it has the unknown tensor {unknown[0]}")
        # Converted before they are assigned, so that no second copy is made.
        vae.load_state_dict({name: tensor.to(dtype) for name, tensor in converted.items()}, strict=True, assign=True)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(f"'{file}' is not a whole BAGEL VAE: {error}. Download it again.") from error
    return vae.eval()


def check_saved_vae(folder: str | os.PathLike) -> None:
    """Compare the VAE of diffusers' layout with its configuration: the library would make up what is missing.

    Args:
        folder (`str`): The `vae` folder of a local repository; nothing is done if it is not there.

    Raises:
        OSError: if a file is truncated.
        ValueError: if a tensor is missing, unexpected or misshapen.
    """
    files = sorted(Path(folder).glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        return
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= read_shapes(file)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"The VAE in '{folder}' does not fit its config.json: {min(wrong)} is {found.get(min(wrong), 'missing')}, "
            f"expected {expected.get(min(wrong), 'no such tensor')}. Download it again."
        )


def vae_config(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of [`AutoencoderKL`], read off the shapes of the published tensors.

    Scale and shift are FLUX's (published behaviour, point 22); the file does not hold them.
    """
    levels = _count(weights, r"encoder\.down\.(\d+)\.")
    widths = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": widths,
        "layers_per_block": _count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": weights["encoder.conv_out.weight"].shape[0] // 2,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": any(".mid.attn_1." in name for name in weights),
    }


def _count(weights: dict[str, torch.Tensor], pattern: str) -> int:
    return len({match.group(1) for name in weights if (match := re.match(pattern, name))})
