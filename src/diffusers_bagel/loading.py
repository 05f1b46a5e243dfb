# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The original repository layout: no `model_index.json`, and the VAE as `ae.safetensors`."""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.checkpoints import (
    check_folder,
    check_values,
    count_matches,
    is_finite,
    open_tensors,
    read_json,
)
from transformers_bagel.errors import shown
from transformers_bagel.files import HUB_ARGUMENTS, find_file, folder_and_file, hub_arguments, place_of
from transformers_bagel.loading import check_stated_ids
from transformers_bagel.packed import default_dtype
from transformers_bagel.weights import contents, find_weights

from .memory import transformer_quantization


VAE_FILE = "ae.safetensors"
# Repositories in which all other safetensors are weights of the model have it in a folder.
VAE_FILES = (VAE_FILE, f"vae/{VAE_FILE}")
# In diffusers' layout.
VAE_SETTINGS = "vae/config.json"

COMPONENTS = ("transformer", "vae", "scheduler", "processor")

# A scheduler makes a table of as many.
MAX_TRAIN_TIMESTEPS = 1_000_000

# Of `DiffusionPipeline.from_pretrained`, beside the components, `dtype` and where files are.
_FOR_TRANSFORMER = ("device_map", "max_memory", "offload_folder")
# What of `from_pretrained` says which weights are read.
_OF_WEIGHTS = ("variant", "transformers_weights", "gguf_file", "ignore_unexpected_keys")
_WITHOUT_EFFECT = ("low_cpu_mem_usage", "offload_state_dict", "disable_mmap", "trust_remote_code")


def settled(
    path: str | os.PathLike, kwargs: dict[str, Any]
) -> tuple[str | os.PathLike, dict[str, Any], dict[str, Any], bool]:
    """
    What is to be loaded as a pipeline.

    Args:
        path (`str` or `os.PathLike`): A directory, a Hub id, or a file of weights.
        kwargs (`dict[str, Any]`): Of [`BagelPipeline.from_pretrained`].

    Returns:
        The directory or the Hub id, the arguments by which the Hub is asked, the arguments of the loader, and whether that
        is the one for the original layout.

    Raises:
        OSError, ValueError: see [`is_original`].
    """
    path, name = folder_and_file(path)
    if name is not None:
        kwargs = {"transformers_weights": name} | kwargs
    hub = hub_arguments(path, kwargs)
    if is_original(path, "vae" in kwargs, hub, kwargs.get("base")):
        return path, hub, kwargs, True
    chosen = {name: kwargs[name] for name in _OF_WEIGHTS if name != "variant" and kwargs.get(name)}
    left_out = {"base", "torch_dtype", *_OF_WEIGHTS} - {"variant"}
    of_the_library = {name: value for name, value in kwargs.items() if name not in left_out}
    if chosen:
        of_the_library["transformer"] = _saved_transformer(path, kwargs, chosen, hub)
    return path, hub, of_the_library | saved_dtypes(path, kwargs, hub) | hub, False


def _saved_transformer(
    path: str | os.PathLike, kwargs: dict[str, Any], chosen: dict[str, Any], hub: dict[str, Any]
) -> Any:
    """The transformer of diffusers' layout, from weights that the caller chose: diffusers itself has no argument for that."""
    in_the_way = ("transformer", "quantization_config", "device_map")
    if others := [name for name in in_the_way if kwargs.get(name) is not None]:
        raise ValueError(
            f"`{min(chosen)}` and `{others[0]}` do not go together in diffusers' layout. Load the weights with "
            "`BagelForConditionalGeneration.from_pretrained`, and pass them as `transformer=` alone."
        )
    part = os.path.join(hub.get("subfolder", ""), "transformer")
    is_apart = find_file(path, "config.json", **(hub | {"subfolder": part})) is not None
    place = hub | {"subfolder": part} if is_apart else hub
    dtype = component_dtypes(kwargs.get("dtype"), kwargs.get("torch_dtype"))["transformer"]
    chosen = chosen | ({"variant": kwargs["variant"]} if kwargs.get("variant") else {})
    return BagelForConditionalGeneration.from_pretrained(path, dtype=dtype, **chosen, **place)


def is_original(
    path: str | os.PathLike, has_vae: bool, hub: dict[str, Any], base: str | os.PathLike | None = None
) -> bool:
    """
    Whether a repository has the original layout, and not diffusers'. Its VAE, or that of `base`, is looked for, and
    diffusers' is checked, unless the caller has one.

    Raises:
        OSError: if it has neither.
        ValueError: if the VAE does not fit its configuration.
    """
    if os.path.isdir(path) and not os.listdir(path):
        raise OSError(f"The directory '{path}' is empty: it holds no checkpoint.")
    check_folder(path)
    if find_file(path, "model_index.json", **hub) is not None:
        if os.path.isdir(path):
            check_saved_parts(path, has_vae)
        return False
    if not has_vae and _vae_place(path, base, hub) is None:
        raise OSError(
            f"'{path}' holds neither model_index.json (diffusers' layout) nor {VAE_FILE} (the original layout): it is no "
            f"BAGEL pipeline; {contents(path, hub)}."
        )
    return True


def _vae_place(
    path: str | os.PathLike, base: str | os.PathLike | None, hub: dict[str, Any]
) -> tuple[str | os.PathLike, dict[str, Any]] | None:
    place, place_hub = place_of(path, base, (*VAE_FILES, VAE_SETTINGS), hub)
    return (
        (place, place_hub) if any(find_file(place, name, **place_hub) for name in (*VAE_FILES, VAE_SETTINGS)) else None
    )


def load_original_components(path: str | os.PathLike, hub: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """
    The components of a pipeline from the original layout; `kwargs` are those of [`DiffusionPipeline.from_pretrained`].

    Raises:
        OSError, TypeError, ValueError: before anything is loaded, if something is missing or an argument cannot work.
    """
    components = {name: kwargs.pop(name) for name in COMPONENTS if name in kwargs}
    dtype, torch_dtype = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
    dtypes = component_dtypes(dtype, torch_dtype)
    if dtype is None and torch_dtype is None and _is_df11(path, hub):
        dtypes["transformer"] = "auto"
    base = kwargs.pop("base", None)
    chosen = {name: kwargs.pop(name) for name in _OF_WEIGHTS if kwargs.get(name) is not None}
    placement = {name: kwargs.pop(name) for name in _FOR_TRANSFORMER if name in kwargs}
    quantization = kwargs.pop("quantization_config", None)
    if kwargs.pop("use_safetensors", None) is False:
        raise ValueError("`use_safetensors=False`: the original layout is read from safetensors only. Leave it out.")
    if chosen.keys() == {"variant"} and "transformer" not in components:
        _check_variant(path, hub, chosen["variant"])
    if unknown := kwargs.keys() - {*HUB_ARGUMENTS, *_OF_WEIGHTS, *_WITHOUT_EFFECT}:
        raise TypeError(
            f"{', '.join(sorted(unknown))}: unknown for the original layout. Load the components with their own "
            "`from_pretrained` and pass them by name."
        )
    if quantization is not None:
        quantization = transformer_quantization(quantization)
    place = {} if base is None else {"base": base}
    if "transformer" not in components:
        components["transformer"] = BagelForConditionalGeneration.from_pretrained(
            path, dtype=dtypes["transformer"], quantization_config=quantization, **chosen, **place, **placement, **hub
        )
    if "vae" not in components:
        vae_path, vae_hub = _vae_place(path, base, hub) or (path, hub)
        vae = load_original_vae(vae_path, None if dtypes["vae"] == "auto" else dtypes["vae"], **vae_hub)
        is_placed = placement.get("device_map") is not None
        components["vae"] = vae.to(components["transformer"].device) if is_placed else vae
    if "scheduler" not in components:
        # Original behaviour, point 19.
        components["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if "processor" not in components:
        components["processor"] = BagelProcessor.from_pretrained(path, **place, **hub)
    return components


def _is_df11(path: str | os.PathLike, hub: dict[str, Any]) -> bool:
    file = find_file(path, "config.json", **hub)
    return file is not None and "dfloat11_config" in read_json(file)


def _check_variant(path: str | os.PathLike, hub: dict[str, Any], variant: str) -> None:
    try:
        find_weights(path, hub, variant=variant)
    except OSError as error:
        raise ValueError(f"`variant`: {error}") from error


def component_dtypes(dtype: Any, torch_dtype: Any) -> dict[str, torch.dtype | str]:
    """Of the transformer and the VAE: types, or `"auto"` for that of the file."""
    given = torch_dtype if dtype is None else dtype
    given = given if isinstance(given, dict) else {"default": given}
    given = {"default": given.get("")} | given
    return {name: _dtype(given.get(name, given.get("default"))) for name in ("transformer", "vae")}


def saved_dtypes(path: str | os.PathLike, kwargs: dict[str, Any], hub: dict[str, Any]) -> dict[str, Any]:
    """The `dtype` of a pipeline in diffusers' layout as the library takes it: types alone, none of them by its name."""
    dtype, torch_dtype = kwargs.get("dtype"), kwargs.get("torch_dtype")
    if dtype is None and torch_dtype is None:
        return {}
    dtypes: dict[str, Any] = component_dtypes(dtype, torch_dtype)
    if dtypes["vae"] == "auto" and (file := find_file(path, "vae/diffusion_pytorch_model.safetensors", **hub)):
        dtypes["vae"] = default_dtype(open_tensors([file]))
    return {"dtype": dtypes}


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
    if (file := next((file for name in VAE_FILES if (file := find_file(path, name, **hub))), None)) is None:
        if find_file(path, VAE_SETTINGS, **hub) is not None:
            folder = os.path.join(hub.get("subfolder", ""), "vae")
            return AutoencoderKL.from_pretrained(path, **(hub | {"subfolder": folder}), dtype=dtype).eval()
        raise OSError(f"'{path}' has no {VAE_FILE}: the VAE of the original layout is missing.")
    return vae_from_file(file, dtype)


def vae_from_file(file: str | os.PathLike, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """See [`load_original_vae`]."""
    weights = {name: tensor[...] for name, tensor in open_tensors([file]).items()}
    try:
        if wrong := [
            name for name, tensor in weights.items() if not tensor.is_floating_point() or not is_finite(tensor)
        ]:
            raise ValueError(f"not all of {wrong[0]} are finite floating numbers")
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


class CheckedDownloadMixin:
    """Of a pipeline in diffusers' layout: what comes from the Hub is checked as that of a folder is."""

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, **kwargs: Any) -> Any:
        """Like the parent's.

        Raises:
            OSError, ValueError: see [`check_saved_parts`].
        """
        folder = super().download(pretrained_model_name, **kwargs)  # type: ignore[misc]  # of the class beside this mixin
        check_saved_parts(folder, "vae" in kwargs)
        return folder


def check_saved_parts(folder: str | os.PathLike, has_vae: bool) -> None:
    """
    Check what is small in a local folder of diffusers' layout, and the VAE, unless the caller has one.

    Raises:
        OSError: if a file is truncated, or is none.
        ValueError: naming the file and the key, if they cannot be used.
    """
    check_folder(folder, *COMPONENTS)
    index = os.path.join(folder, "model_index.json")
    if "_class_name" not in read_json(index):
        raise ValueError(f"`_class_name` in '{index}' is missing: it describes no pipeline.")
    for name, value in read_json(index).items():
        is_class = isinstance(value, list) and [type(part) for part in value] in ([str, str], [type(None)] * 2)
        if name in COMPONENTS and not is_class:
            raise ValueError(f"`{name}` in '{index}' must be a library and a class, got {shown(value)}.")
    scheduler = Path(folder, "scheduler", "scheduler_config.json")
    steps = read_json(scheduler).get("num_train_timesteps", 1) if scheduler.exists() else 1
    if not isinstance(steps, int) or not 1 <= steps <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(
            f"`num_train_timesteps` in '{scheduler}' must be 1 to {MAX_TRAIN_TIMESTEPS}, got {shown(steps)}."
        )
    config = next((file for file in Path(folder).glob("transformer/config.json")), Path(folder, "config.json"))
    if config.exists():
        processor = Path(folder, "processor")
        check_stated_ids(read_json(config), f"'{config}'", processor if processor.exists() else folder)
    if not has_vae:
        check_saved_vae(os.path.join(folder, "vae"))


def check_saved_vae(folder: str | os.PathLike) -> None:
    """Compare the VAE in a local folder of diffusers' layout, if it is there, with its configuration: the library would
    make up what is missing.

    Raises:
        OSError: if a file is truncated.
        ValueError: if a setting cannot be used, or if a tensor is missing, unexpected or misshapen, or not finite.
    """
    files = sorted(Path(folder).glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        return
    tensors = {name: tensor for name, tensor in open_tensors(files).items() if tensor.dtype.is_floating_point}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    file = Path(folder, "config.json")
    config = read_json(file)
    layers = count_matches(found, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    # What would be built is as long as these.
    sizes = {"layers_per_block": layers} | dict.fromkeys(
        ("block_out_channels", "down_block_types", "up_block_types"),
        count_matches(found, r"encoder\.down_blocks\.(\d+)\."),
    )
    for key, size in sizes.items():
        value = config.get(key, size)
        if (len(value) if isinstance(value, list) else value) != size:
            raise ValueError(
                f"`{key}` in '{file}' must be of {size}, as the weights beside it are, got {shown(value)}."
            )
    for key in ("scaling_factor", "shift_factor"):
        if not isinstance(config.get(key) or 0.0, (int, float)):
            raise ValueError(f"`{key}` in '{file}' must be a number, got {shown(config[key])}.")
    try:
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(config)
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        raise ValueError(f"'{file}' describes no VAE that can be built: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"The VAE in '{folder}' does not fit its config.json: {min(wrong)} is {found.get(min(wrong), 'missing')}, "
            f"expected {expected.get(min(wrong), 'no such tensor')}. Download it again."
        )
    check_values(tensors, folder)


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
