# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""One call that compiles what is worth compiling, and one that undoes it (docs/speed.md)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig

from transformers_bagel.products import told_products

from .inputs import check_flag, check_whole_number


@dataclass(frozen=True)
class _Before:
    """How a transformer was before it was compiled: its layers with their calls, and its decoding."""

    calls: list[tuple[nn.Module, Any]]
    decoding_settings: dict[str, Any] | None


# Of each transformer that is compiled: several pipelines may share one.
_before: weakref.WeakKeyDictionary[Any, _Before] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class CompileReport:
    """
    What [`BagelPipeline.compile`] did.

    Attributes:
        layers (`int`): That are compiled, in the first forward of each kind.
        cache_len (`int`, *optional*): Tokens for which `generate()` lays out a static cache, for which its forward is compiled once.
        decoding (`str`): What `generate()` does, and why.
        products (`str`): By what products of float32 are computed, and why.
    """

    layers: int
    cache_len: int | None
    decoding: str
    products: str

    def __str__(self) -> str:
        layers = f"layers: {self.layers} are compiled in the first forward of each kind"
        return f"{layers}\ndecoding: {self.decoding}\n{self.products}"


class CompileMixin:
    """`compile` and `undo_compile` of the pipeline."""

    transformer: Any
    _execution_device: torch.device

    def compile(self, decode: bool | None = None, max_cache_len: int = 2048, **kwargs: Any) -> CompileReport:
        """
        Compile the layers, and decoding with a static cache. Nothing is compiled yet when it returns.

        Products of float32 need no call: they are by what is faster on this CPU in any case, which the report tells.

        Args:
            decode (`bool`, *optional*):
                Whether `generate()` takes a static cache and a forward compiled for it. By default on accelerators, where the host
                limits it, unless the weights are offloaded; on a CPU what it gains is lost to attention over all places of the
                cache. A call that names a cache, or hands it out by `return_dict_in_generate`, decodes as before.
            max_cache_len (`int`, *optional*, defaults to 2048):
                Tokens of that cache. A longer text makes a longer one, and compiles once more.
            kwargs: Of [`torch.compile`], such as `mode`, for the layers; `fullgraph` is true by default.

        Returns:
            [`CompileReport`]

        Raises:
            TypeError, ValueError: for a length that is none.
            RuntimeError: if it was called already.
        """
        if decode is not None:
            check_flag("decode", decode)
        check_whole_number("max_cache_len", max_cache_len, 1)
        if self.transformer in _before:
            raise RuntimeError("The transformer is compiled already. Call `undo_compile()` first.")
        kinds = set(self.transformer._no_split_modules)
        layers = [module for module in self.transformer.modules() if type(module).__name__ in kinds]
        before = _Before([(layer, layer._compiled_call_impl) for layer in layers], self.transformer.decoding_settings)
        self.transformer.compile_repeated_blocks(**({"fullgraph": True} | kwargs))
        device = self._execution_device
        stays = _why_decoding_stays(self.transformer, device) if decode is None else None if decode else "as before"
        if stays is None:
            settings = CompileConfig(mode="default", fullgraph=True, dynamic=False)
            # The library compiles on accelerators only, unless it is told.
            settings._compile_all_devices = True
            self.transformer.decoding_settings = {
                "cache_implementation": "static",
                "max_cache_len": max_cache_len,
                "compile_config": settings,
            }
        _before[self.transformer] = before
        cache_len = max_cache_len if stays is None else None
        decoding = stays or f"generate() has a static cache of {cache_len} tokens, and a forward compiled for it"
        return CompileReport(len(layers), cache_len, decoding, _told(self.transformer, device))

    def undo_compile(self) -> None:
        """
        Put back all that [`compile`] has set: layers and decoding run as before it.

        Raises:
            RuntimeError: if it was not called.
        """
        if self.transformer not in _before:
            raise RuntimeError("The transformer is not compiled.")
        before = _before.pop(self.transformer)
        for layer, call in before.calls:
            layer._compiled_call_impl = call
        self.transformer.decoding_settings = before.decoding_settings


def _why_decoding_stays(transformer: Any, device: torch.device) -> str | None:
    """Why decoding is left as it was where nobody asks for more; `None` where it is worth compiling."""
    if device.type == "cpu":
        return "as before, which is as fast on a CPU"
    if transformer.device.type != device.type:
        return f"as before, since between forwards the weights are elsewhere than on {device.type}"
    return None


def _told(transformer: Any, device: torch.device) -> str:
    if device.type != "cpu" or transformer.dtype != torch.float32:
        return f"products of {str(transformer.dtype).removeprefix('torch.')} on {device.type}: nothing to choose"
    return told_products(transformer.config)
