# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The original repository layout: no `model_index.json`, and the VAE as `ae.safetensors`."""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.loading import HUB_ARGUMENTS, find_file, open_tensors, read_shapes
from transformers_bagel.original_config import count_matches

from .memory import transformer_quantization


VAE_FILE = "ae.safetensors"

COMPONENTS = ("transformer", "vae", "scheduler", "processor")

# Of `DiffusionPipeline.from_pretrained`, beside the components, `dtype` and where files are.
_FOR_TRANSFORMER = ("device_map", "max_memory", "offload_folder")
_WITHOUT_EFFECT = ("low_cpu_mem_usage", "offload_state_dict", "disable_mmap", "trust_remote_code")


def is_original(path: str | os.PathLike, has_vae: bool, hub: dict[str, Any]) -> bool:
    """
    Whether a repository has the original layout, and not diffusers'. Its VAE is looked for, and diffusers' is checked,
    unless the caller has one.

    Raises:
        OSError: if it has neither.
        ValueError: if the VAE does not fit its configuration.
    """
    if os.path.isdir(path) and not os.listdir(path):
        raise OSError(f"The directory '{path}' is empty: it holds no checkpoint.")
    if find_file(path, "model_index.json", **hub) is not None:
        if not has_vae:
            check_saved_vae(os.path.join(path, "vae"))
        return False
    if not has_vae and find_file(path, VAE_FILE, **hub) is None:
        raise OSError(
            f"'{path}' holds neither model_index.json (diffusers' layout) nor {VAE_FILE} (the original layout): it is no "
            "BAGEL pipeline. Pass the folder of a checkpoint."
        )
    return True


def load_original_components(path: str | os.PathLike, hub: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """
    The components of a pipeline from the original layout; `kwargs` are those of [`DiffusionPipeline.from_pretrained`].

    Raises:
        OSError, TypeError, ValueError: before anything is loaded, if something is missing or an argument cannot work.
    """
    components = {name: kwargs.pop(name) for name in COMPONENTS if name in kwargs}
    dtypes = _component_dtypes(kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
    placement = {name: kwargs.pop(name) for name in _FOR_TRANSFORMER if name in kwargs}
    quantization = kwargs.pop("quantization_config", None)
    if kwargs.pop("variant", None) is not None:
        raise ValueError("`variant`: the original layout has one set of weights. Leave it out, or give a `dtype`.")
    if kwargs.pop("use_safetensors", None) is False:
        raise ValueError("`use_safetensors=False`: the original layout is read from safetensors only. Leave it out.")
    if unknown := kwargs.keys() - {*HUB_ARGUMENTS, *_WITHOUT_EFFECT}:
        raise TypeError(
            f"{', '.join(sorted(unknown))}: unknown for the original layout. Load the components with their own "
            "`from_pretrained` and pass them by name."
        )
    if quantization is not None:
        quantization = transformer_quantization(quantization)
    if "transformer" not in components:
        components["transformer"] = BagelForConditionalGeneration.from_pretrained(
            path, dtype=dtypes["transformer"], quantization_config=quantization, **placement, **hub
        )
    if "vae" not in components:
        vae = load_original_vae(path, None if dtypes["vae"] == "auto" else dtypes["vae"], **hub)
        is_placed = placement.get("device_map") is not None
        components["vae"] = vae.to(components["transformer"].device) if is_placed else vae
    if "scheduler" not in components:
        # Original behaviour, point 19.
        components["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if "processor" not in components:
        components["processor"] = BagelProcessor.from_pretrained(path, **hub)
    return components


def _component_dtypes(dtype: Any, torch_dtype: Any) -> dict[str, torch.dtype | str]:
    """Of the transformer and the VAE: types, or `"auto"` for that of the file."""
    given = torch_dtype if dtype is None else dtype
    given = given if isinstance(given, dict) else {"default": given}
    return {name: _dtype(given.get(name, given.get("default"))) for name in ("transformer", "vae")}


def _dtype(value: Any) -> torch.dtype | str:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value is None:
        return torch.float32
    if value == "auto":
        return value
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`dtype` must be a floating type, its name, 'auto', or a dict of these, got {value!r}.")
    return found


def load_original_vae(path: str | os.PathLike, dtype: torch.dtype | None = None, **hub: Any) -> AutoencoderKL:
    """The VAE of the original layout in a directory or on the Hub (see [`hub_arguments`]) as diffusers' [`AutoencoderKL`],
    by default in the file's types.

    Raises:
        OSError: if the file is missing or truncated.
        ValueError: if it is not the VAE of BAGEL.
    """
    if (file := find_file(path, VAE_FILE, **hub)) is None:
        raise OSError(f"'{path}' has no {VAE_FILE}: the VAE of the original layout is missing.")
    return vae_from_file(file, dtype)


def vae_from_file(file: str | os.PathLike, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """See [`load_original_vae`]."""
    weights = {name: tensor[...] for name, tensor in open_tensors([str(file)]).items()}
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
    """Compare the VAE in a local folder of diffusers' layout, if it is there, with its configuration: the library would
    make up what is missing.

    Raises:
        OSError: if a file is truncated.
        ValueError: if a tensor is missing, unexpected or misshapen.
    """
    files = sorted(Path(folder).glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        return
    found = read_shapes([str(file) for file in files])
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"The VAE in '{folder}' does not fit its config.json: {min(wrong)} is {found.get(min(wrong), 'missing')}, "
            f"expected {expected.get(min(wrong), 'no such tensor')}. Download it again."
        )


def name_own_modules(config_dict: dict[str, Any]) -> dict[str, Any]:
    """
    A model_index.json whose components of this package are named by their modules.

    diffusers looks into a repository before it runs the code that imports this package. Until then it knows no library
    by which our classes could be named there, so such a repository says `transformers`.
    """
    own = {cls.__name__: cls.__module__ for cls in (BagelForConditionalGeneration, BagelProcessor)}
    named = dict(config_dict)
    for name, value in config_dict.items():
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == "transformers":
            named[name] = [own.get(value[1], value[0]), value[1]]
    return named


def vae_config(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of [`AutoencoderKL`], read off the shapes of the original tensors.

    Scale and shift are FLUX's (original behaviour, point 22); the file does not hold them.
    """
    levels = count_matches(weights, r"encoder\.down\.(\d+)\.")
    widths = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": widths,
        "layers_per_block": count_matches(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": weights["encoder.conv_out.weight"].shape[0] // 2,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": any(".mid.attn_1." in name for name in weights),
    }
