# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The strength of adapters in one call of a pipeline, `attention_kwargs["scale"]`."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.utils import logging

from transformers_bagel.adapters import adapted_layers

from .inputs import check_number


logger = logging.get_logger(__name__)

# Of each model.
_locks: WeakKeyDictionary[torch.nn.Module, Lock] = WeakKeyDictionary()
_locks_lock = Lock()


def check_adapter_scale(model: torch.nn.Module, attention_kwargs: dict[str, Any] | None) -> None:
    """
    Refuse a `scale` that adapters cannot be multiplied by; warn where there are none.

    Raises:
        TypeError, ValueError: if `attention_kwargs["scale"]` is no finite number.
    """
    if attention_kwargs and "scale" in attention_kwargs:
        check_number('attention_kwargs["scale"]', attention_kwargs["scale"], -1e9)
        if all(layer.merged for layer in lora_layers(model)):
            logger.warning('`attention_kwargs["scale"]` has no effect: the transformer has no LoRA that is not fused.')


@contextmanager
def scaled_adapters(model: torch.nn.Module, attention_kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """
    Multiply the active adapters of a model by `attention_kwargs["scale"]` while it is called once.

    peft keeps one number a layer, which all threads read. So calls of a model with adapters take turns, and each finds the
    numbers that the user has set.

    Returns:
        `dict`: What is left of the arguments for the model.
    """
    kwargs = {name: value for name, value in attention_kwargs.items() if name != "scale"}
    if not getattr(model, "peft_config", None) and "scale" not in attention_kwargs:
        yield kwargs
        return
    with _lock_of(model):
        scale = attention_kwargs.get("scale", 1.0)
        # Merged layers do not read their scaling, except to be unmerged.
        layers = [layer for layer in lora_layers(model) if not layer.merged] if scale != 1 else []
        before = [(layer, dict(layer.scaling)) for layer in layers]
        try:
            for layer in layers:
                for name in layer.active_adapters:
                    if name in layer.scaling:
                        layer.scaling[name] = layer.scaling[name] * scale
            yield kwargs
        finally:
            for layer, scaling in before:
                layer.scaling.update(scaling)


def lora_layers(model: torch.nn.Module) -> list[Any]:
    """The layers of a model that have adapters with a scaling."""
    return [layer for layer in adapted_layers(model).values() if hasattr(layer, "scaling")]


def _lock_of(model: torch.nn.Module) -> Lock:
    with _locks_lock:
        return _locks.setdefault(getattr(model, "_orig_mod", model), Lock())
