# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Weights that others have made smaller: FP8 with scales, GGUF, DFloat11. Their tensors are unpacked one by one, when the
library reads them; those of DFloat11 stay packed, and its own library unpacks them in every forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .checkpoints import any_of, module_name, open_tensors
from .errors import some
from .quantization import SENSITIVE_MODULES


# What makers of FP8 files call the factors of `<layer>.weight`; all of them multiply.
_SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
# Of activations, or marks without numbers of the model.
_FP8_MARKS = re.compile(r"(^|\.)(scale_input|input_scale|scaled_fp8|comfy_quant)$")
_DF11 = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps", "split_positions")


class Unpacked:
    """
    A tensor that does not exist until it is read at `[...]`, like a [`StoredTensor`] otherwise.

    Args:
        shape (`tuple[int, ...]`)
        dtype (`torch.dtype`): What its file says; the type of what is read is another.
        read (`Callable`): Gives it.
        packed (`Any`, *optional*): What it is in a GGUF, if its values are packed there.
        parts (`tuple[StoredTensor, ...]`, *optional*): Of what it is made, as far as that can be looked at.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        read: Callable[[], torch.Tensor],
        packed: Any = None,
        parts: tuple[Any, ...] = (),
    ):
        self.shape = shape
        self.dtype = dtype
        self.read = read
        self.packed = packed
        self.parts = parts

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]


def open_weights(files: list[str]) -> dict[str, Any]:
    """
    The tensors of files of weights by name, none of them read: each a [`StoredTensor`], or [`Unpacked`] if it is packed in its
    file.

    Raises:
        ImportError: if a library is missing that reads files of this kind.
        OSError, ValueError: if a file is broken, or is of another model.
    """
    if files and files[0].endswith(".gguf"):
        return _open_gguf(files[0])
    return _without_scales(open_tensors(files))


def default_dtype(tensors: Mapping[str, Any]) -> torch.dtype | None:
    """The type of a model from its tensors: that of the first of floating numbers of more than 8 bits, in which nothing
    computes."""
    types = [tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point]
    return next((dtype for dtype in types if dtype.itemsize > 1), torch.bfloat16 if types else None)


def scales_of(tensors: Mapping[str, Any]) -> dict[str, str]:
    """
    The names of weights in FP8 with those of their factors.

    Raises:
        ValueError: if a weight has something beside it of which nobody knows how it changes the weight.
    """

    def scale_of(name: str) -> str | None:
        layer = name.removesuffix("weight")
        return next((layer + scale for scale in _SCALES if layer + scale in tensors), None)

    scales = {
        name: scale
        for name, tensor in tensors.items()
        if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point and (scale := scale_of(name))
    }
    for name in tensors:
        match = re.fullmatch(r"(.*\.|)(weight_|scale)\w+", name)
        weight = tensors.get(f"{match[1]}weight") if match else None
        is_packed = weight is not None and weight.dtype.itemsize == 1 and weight.dtype.is_floating_point
        if match and is_packed and name != scales.get(f"{match[1]}weight") and not _FP8_MARKS.search(name):
            raise ValueError(
                f"'{name}' is beside a weight in FP8, and how it changes the weight is not known: factors are called "
                f"{some(_SCALES)}, one for each weight. Pass the weights in bfloat16."
            )
    return scales


def _without_scales(tensors: Mapping[str, Any]) -> dict[str, Any]:
    scales = scales_of(tensors)
    gone = {*scales.values(), *(name for name in tensors if _FP8_MARKS.search(name))}
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    for name, scale in scales.items():
        packed, factor = tensors[name], tensors[scale]
        read = partial(_scaled_at_last, packed, factor)
        kept[name] = Unpacked(packed.shape, packed.dtype, read, parts=(packed, factor))
    return kept


def _scaled_at_last(weight: Any, scale: Any) -> torch.Tensor:
    return scaled(weight[...], scale[...])


def scaled(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    A weight of FP8 in float32.

    Args:
        weight (`torch.Tensor` of shape `(rows, columns)`)
        scale (`torch.Tensor`): Of any shape: one for all, for each row, or for blocks, of which the last may be cut.
    """
    scale = scale.float()
    if scale.numel() > 1:
        scale = scale.reshape(*scale.shape, *[1] * (weight.dim() - scale.dim()))
        for axis, side in enumerate(weight.shape):
            if scale.shape[axis] not in (1, side):
                # Blocks are powers of two, and the last may be cut.
                block = 1 << (-(-side // scale.shape[axis]) - 1).bit_length()
                scale = scale.repeat_interleave(block, axis).narrow(axis, 0, side)
    return weight.float() * scale


def _open_gguf(file: str) -> dict[str, Any]:
    gguf = _library("gguf", file, "gguf")
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise OSError(f"'{file}' is truncated or is no GGUF file ({error}). Download it again.") from error
    names = [tensor.name for tensor in reader.tensors]
    if any(re.match(r"(blk|v\.blk|token_embd)\.", name) for name in names):
        architecture = reader.fields.get("general.architecture")
        raise ValueError(
            f"'{file}' is a GGUF of the architecture {architecture.contents() if architecture else 'unknown'}, made for "
            f"llama.cpp, with {some(names)}: it is no BAGEL. Pass one with the names of the original checkpoint."
        )
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    own = [plain[tensor.tensor_type.name] for tensor in reader.tensors if tensor.tensor_type.name in plain]
    own_type = next((dtype for dtype in own if dtype.itemsize == 2), torch.float32)
    tensors = {}
    for tensor in reader.tensors:
        # The sides of a GGUF are in the reverse order.
        shape = tuple(int(side) for side in reversed(tensor.shape))
        dtype = plain.get(tensor.tensor_type.name, own_type)
        packed = None if tensor.tensor_type.name in plain else tensor
        tensors[tensor.name] = Unpacked(shape, dtype, partial(_dequantized, tensor, shape), packed)
    return tensors


def _dequantized(tensor: Any, shape: tuple[int, ...]) -> torch.Tensor:
    values = _library("gguf", tensor.name, "gguf").quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values.copy()).reshape(shape)


def is_df11(names: Any) -> bool:
    return any(name.endswith(".encoded_exponent") for name in names)


def df11_dtype(dtype: Any) -> torch.dtype:
    """The type of a model in DFloat11, for which a caller asks.

    Raises:
        ValueError: if it is another.
    """
    if dtype not in (None, "auto", "bfloat16", torch.bfloat16):
        raise ValueError(f"`dtype` of weights in DFloat11 is bfloat16, got {dtype}. Leave it out.")
    return torch.bfloat16


def with_df11_weights(tensors: dict[str, Any], settings: Any, model: nn.Module, path: Any) -> dict[str, Any]:
    """
    The tensors of a DFloat11 folder with empty weights in place of the packed ones, for a model that is loaded before
    [`load_df11`] fills it.

    Args:
        tensors (`dict`): See [`open_weights`].
        settings (`Any`): The `dfloat11_config` of its `config.json`.
        model (`nn.Module`): On any device.
        path (`str`): What errors call it.

    Raises:
        ImportError: if its library is missing.
        ValueError: if the settings do not say what is packed where.
    """
    _library("dfloat11", path, "dfloat11[cuda12]")
    patterns = settings.get("pattern_dict") if isinstance(settings, dict) else None
    if not isinstance(patterns, dict):
        raise ValueError(f"`dfloat11_config` in the config.json of '{path}' must have a `pattern_dict`.")
    shapes = {name.removeprefix("model."): tuple(value.shape) for name, value in model.state_dict().items()}
    packed = {name for name in tensors if name.rpartition(".")[2] in _DF11}
    kept = {name: tensor for name, tensor in tensors.items() if name not in packed}
    for module in sorted({name.rpartition(".")[0] for name in packed}):
        parts = next((parts for pattern, parts in patterns.items() if re.fullmatch(pattern, module)), ())
        for weight in [f"{module}.{part}.weight" for part in parts] or [f"{module}.weight"]:
            shape = shapes.get(module_name(weight).removeprefix("model."), ())
            kept[weight] = _placeholder(shape, torch.bfloat16)
    return kept


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> Unpacked:
    """A tensor that takes no memory, for a weight that is taken away once the model is loaded."""
    return Unpacked(shape, dtype, lambda: torch.empty((), dtype=dtype).expand(shape))


def is_gguf_config(quantization_config: Any) -> bool:
    """Whether it is diffusers' [`GGUFQuantizationConfig`], or its `dict`."""
    method = getattr(quantization_config, "quant_method", None)
    if isinstance(quantization_config, dict):
        method = quantization_config.get("quant_method")
    return getattr(method, "value", method) == "gguf"


def gguf_dtype(quantization_config: Any, dtype: Any) -> Any:
    """
    The type in which a model with layers of a GGUF computes: `dtype`, or that of its [`GGUFQuantizationConfig`].

    Raises:
        ValueError: if they differ: diffusers' layers take inputs of their own type.
    """
    is_dict = isinstance(quantization_config, dict)
    stated = (quantization_config if is_dict else vars(quantization_config)).get("compute_dtype")
    stated = getattr(torch, stated.removeprefix("torch.")) if isinstance(stated, str) else stated
    given = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if stated is not None and given not in (None, stated):
        raise ValueError(
            f"`compute_dtype` of `quantization_config` is {stated}, and `dtype` {given}. Pass the same for both."
        )
    return dtype if stated is None else stated


def with_gguf_layers(
    tensors: dict[str, Any], model: nn.Module, dtype: torch.dtype, path: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The tensors of a GGUF without those that its linear layers keep packed, and the latter by the names of their modules, for
    [`load_gguf_layers`].

    Args:
        tensors (`dict`): See [`open_weights`].
        model (`nn.Module`): On any device.
        dtype (`torch.dtype`): In which it will be loaded.
        path (`str`): What errors call it.

    Raises:
        ValueError: if they are of no GGUF.
    """
    spared = any_of([*SENSITIVE_MODULES, "lm_head"])
    modules = {
        f"{name}.weight".removeprefix("model."): name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not re.match(spared, name)
    }
    layers = {}
    for key, tensor in tensors.items():
        name = modules.get(module_name(key).removeprefix("model."))
        if name is not None and getattr(tensor, "packed", None) is not None:
            layers[name] = tensor.packed
            tensors = tensors | {key: _placeholder(tensor.shape, dtype)}
    if not layers:
        raise ValueError(
            f"`quantization_config` is that of a GGUF, and no layer in '{path}' is packed as one. Leave it out."
        )
    return tensors, layers


def load_gguf_layers(model: nn.Module, layers: dict[str, Any], compute_dtype: torch.dtype) -> None:
    """Put diffusers' layers, which unpack their weights in every forward, in place of a model's own."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    for name, packed in layers.items():
        own = model.get_submodule(name)
        assert isinstance(own, nn.Linear)
        layer = GGUFLinear(own.in_features, own.out_features, False, compute_dtype, device="meta")
        layer.weight = GGUFParameter(torch.from_numpy(packed.data.copy()), quant_type=packed.tensor_type)
        layer.bias = own.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)


def load_df11(model: Any, folder: str) -> None:
    """Give a model the packed weights of a DFloat11 folder, in place of its own; they are unpacked on a GPU."""
    _library("dfloat11", folder, "dfloat11[cuda12]").DFloat11Model.from_pretrained(
        folder, device="cpu", bfloat16_model=_original_tree(model)
    )


def _original_tree(model: Any) -> nn.Module:
    """The modules of a model under the names of the original code, by which the library of DFloat11 looks for them."""

    def tree(**children: nn.Module) -> nn.Module:
        module = nn.Module()
        for name, child in children.items():
            module.add_module(name, child)
        return module

    inner = model.model
    root = tree(language_model=tree(model=inner.language_model, lm_head=model.lm_head))
    if model.config.visual_und:
        root.add_module("vit_model", tree(vision_model=inner.vision_tower))
        root.add_module("connector", inner.connector)
        root.add_module("vit_pos_embed", inner.vit_pos_embed)
    if model.config.visual_gen:
        times = inner.time_embedder
        root.add_module("time_embedder", tree(mlp=nn.Sequential(times.linear_1, times.act, times.linear_2)))
        for name in ("vae2llm", "llm2vae", "latent_pos_embed"):
            root.add_module(name, getattr(inner, name))
    return root


def _library(name: str, path: Any, package: str) -> Any:
    if find_spec(name) is None:
        raise ImportError(f"'{path}' needs the library `{name}`: pip install '{package}'.")
    return __import__(name)
