# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""One call that compiles what is worth compiling, and one that undoes it (docs/speed.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig

from transformers_bagel.products import told_products

from .inputs import check_whole_number


@dataclass(frozen=True)
class CompileReport:
    """
    What [`BagelPipeline.compile`] did.

    Attributes:
        layers (`int`): That are compiled, in the first forward of each kind.
        cache_len (`int`): Tokens for which `generate()` lays out a static cache, for which its forward is compiled once.
        products (`str`): By what products of float32 are computed, and why.
    """

    layers: int
    cache_len: int
    products: str

    def __str__(self) -> str:
        return "\n".join(
            (
                f"layers: {self.layers} are compiled in the first forward of each kind",
                f"decoding: generate() has a static cache of {self.cache_len} tokens, and a forward compiled for it",
                self.products,
            )
        )


class CompileMixin:
    """`compile` and `undo_compile` of the pipeline."""

    transformer: Any
    _plain_calls: list[tuple[nn.Module, Any]] | None = None

    def compile(self, max_cache_len: int = 2048, **kwargs: Any) -> CompileReport:
        """
        Compile the layers, and decoding with a static cache. Nothing is compiled yet when it returns.

        Products of float32 need no call: they are by what is faster on this CPU in any case, which the report tells.

        Args:
            max_cache_len (`int`, *optional*, defaults to 2048):
                Tokens of the static cache of `generate()`. A longer text makes a longer one, and compiles once more.
            kwargs: Of [`torch.compile`], such as `mode`, for the layers; `fullgraph` is true by default.

        Returns:
            [`CompileReport`]

        Raises:
            TypeError, ValueError: for a length that is none.
            RuntimeError: if it was called already.
        """
        check_whole_number("max_cache_len", max_cache_len, 1)
        if self._plain_calls is not None:
            raise RuntimeError("The pipeline is compiled already. Call `undo_compile()` first.")
        kinds = set(self.transformer._no_split_modules)
        layers = [module for module in self.transformer.modules() if type(module).__name__ in kinds]
        plain = [(layer, layer._compiled_call_impl) for layer in layers]
        self.transformer.compile_repeated_blocks(**({"fullgraph": True} | kwargs))
        settings = CompileConfig(mode="default", fullgraph=True, dynamic=False)
        # The library compiles on accelerators only, unless it is told.
        settings._compile_all_devices = True
        self.transformer.decoding_settings = {
            "cache_implementation": "static",
            "max_cache_len": max_cache_len,
            "compile_config": settings,
        }
        self._plain_calls = plain
        return CompileReport(len(layers), max_cache_len, _told(self.transformer))

    def undo_compile(self) -> None:
        """
        Put back all that [`compile`] has set: layers and decoding run as before it.

        Raises:
            RuntimeError: if it was not called.
        """
        if self._plain_calls is None:
            raise RuntimeError("The pipeline is not compiled.")
        for layer, call in self._plain_calls:
            layer._compiled_call_impl = call
        self.transformer.decoding_settings = None
        self._plain_calls = None


def _told(transformer: Any) -> str:
    if transformer.device.type != "cpu" or transformer.dtype != torch.float32:
        return f"products of {str(transformer.dtype).removeprefix('torch.')} on {transformer.device.type}: nothing to choose"
    text = transformer.config.get_text_config()
    return told_products(text.hidden_size, text.intermediate_size)
