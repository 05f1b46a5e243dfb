# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The strength of adapters in one call of a pipeline, `attention_kwargs["scale"]`."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.utils import logging

from transformers_bagel.adapters import adapted_layers

from .inputs import check_number


logger = logging.get_logger(__name__)

# Of each model. What a forward calls back may ask for the adapters.
_locks: WeakKeyDictionary[torch.nn.Module, RLock] = WeakKeyDictionary()
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


class AdapterScale:
    """
    The strength of a model's active adapters in the forwards of one call.

    peft keeps one number a layer, which all threads read. So forwards of a model with adapters take turns, and between them
    the layers have the numbers that the user has set.

    Args:
        model (`nn.Module`): Its layers are looked for here, once, and not at every step.
        attention_kwargs (`dict`, *optional*): As in the pipeline's `__call__`; by `scale` the adapters are multiplied.

    Attributes:
        attention_kwargs (`dict`): What is left for the model.
        residual_dtype (`torch.dtype`, *optional*): The part of it that is for texts, too.
    """

    def __init__(self, model: torch.nn.Module, attention_kwargs: dict[str, Any] | None):
        self.attention_kwargs = dict(attention_kwargs or {})
        self.scale = self.attention_kwargs.pop("scale", 1.0)
        self.residual_dtype = self.attention_kwargs.get("residual_dtype")
        self._model = model
        self._layers = lora_layers(model) if self.scale != 1 else []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """To be entered for each forward."""
        if not self._layers and not getattr(self._model, "peft_config", None):
            yield
            return
        with lock_of(self._model):
            # Merged layers do not read their scaling, except to be unmerged.
            before = [(layer, dict(layer.scaling)) for layer in self._layers if not layer.merged]
            try:
                for layer, scaling in before:
                    for name in layer.active_adapters:
                        if name in scaling:
                            layer.scaling[name] = scaling[name] * self.scale
                yield
            finally:
                for layer, scaling in before:
                    layer.scaling.update(scaling)


def lora_layers(model: torch.nn.Module) -> list[Any]:
    """The layers of a model that have adapters with a scaling."""
    return [layer for layer in adapted_layers(model).values() if hasattr(layer, "scaling")]


def lock_of(model: torch.nn.Module) -> RLock:
    """What is held while the layers of a model have the numbers of one call."""
    with _locks_lock:
        return _locks.setdefault(getattr(model, "_orig_mod", model), RLock())
