# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Adapters: the layers that LoRA changes by default, float32 masters, and saving that loses none in silence."""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations import PeftAdapterMixin
from transformers.utils import is_peft_available, logging


logger = logging.get_logger(__name__)

# Anchored at the language model: the projections of the vision tower have the same names.
_LAYER = r"(?:(?:.*\.)?language_model\.|(?:base_model\.model\.)?)layers\.\d+\."

# Patterns for `LoraConfig(target_modules=...)`: attention and MLP of the experts that draw, of those that understand,
# and of both.
LORA_TARGETS: dict[str, str] = {
    name: rf"{_LAYER}(?:self_attn\.[qkvo]_proj{suffix}|mlp{suffix}\.(?:gate|up|down)_proj)"
    for name, suffix in (("gen", "_moe_gen"), ("und", ""), ("both", "(?:_moe_gen)?"))
}


# Applied after the adapter's name was put behind the first part.
DORA_RENAMING = (r"(lora_magnitude_vector\.[^.]+)$", r"\1.weight")


def register_lora_targets() -> None:
    """Let `LoraConfig()` without `target_modules` adapt both experts. Without peft there is nothing to do."""
    if not is_peft_available():
        return
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    for model_type in ("bagel", "bagel_text"):
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(model_type, LORA_TARGETS["both"])


class BagelAdapterMixin(PeftAdapterMixin):
    """The library's adapter methods, with float32 masters (point 36) and with words for what a save leaves out."""

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """
        Add a fresh adapter and activate it. Its weights are float32, whatever the model's are.

        Args:
            adapter_config (`peft.PeftConfig`): Without `target_modules`, LoRA adapts `LORA_TARGETS["both"]`.
            adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.

        Raises:
            TypeError: if `adapter_config` is no `PeftConfig`.
            ValueError: if there is an adapter of that name.
        """
        super().add_adapter(adapter_config, adapter_name)
        settle_adapter(self, adapter_name or "default")

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        *args: Any,
        load_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As [`transformers.integrations.PeftAdapterMixin.load_adapter`], with LoRA weights in float32, and DoRA."""
        # The library would round the weights to the model's dtype while it reads them,
        kwargs.setdefault("dtype_plan", {"lora_": torch.float32})
        # and leave the magnitudes of DoRA in the file: their names there end early.
        mapping = getattr(load_config, "weight_mapping", None) or get_model_conversion_mapping(self)
        kwargs.setdefault("weight_mapping", [*mapping, WeightRenaming(*DORA_RENAMING)])
        return super().load_adapter(peft_model_id, adapter_name, *args, load_config=load_config, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As [`PreTrainedModel.save_pretrained`]: with an adapter of `add_adapter` or `load_adapter` only that adapter
        is written, and a warning tells what is not.

        Raises:
            ValueError: if several adapters are active, before anything is written.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            with _config_of_live_adapter(self):
                super().save_pretrained(save_directory, *args, **kwargs)
            return
        # Layers of a `PeftModel`, or left behind by a deleted adapter: their names would fit no model.
        with merged_adapters(self):
            super().save_pretrained(save_directory, *args, **kwargs)

    # diffusers reads off it what a component's method takes.
    save_pretrained.__signature__ = inspect.signature(PreTrainedModel.save_pretrained)  # type: ignore[attr-defined]


def settle_adapter(model: nn.Module, adapter_name: str) -> None:
    """Make a new adapter float32, and its dropout train only if the model does."""
    from peft.functional import cast_adapter_dtype

    cast_adapter_dtype(model, adapter_name)
    if not model.training:
        model.eval()


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """
    For the time of a save, put plain layers in the place of adapted ones: they compute what those compute now.

    A merged layer is a copy on the CPU, so that the model is bit for bit what it was afterwards.
    """
    layers = _adapted_layers(model)
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    try:
        for name, layer in layers.items():
            model.set_submodule(name, _plain_layer(layer))
        model._hf_peft_config_loaded = False
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        model._hf_peft_config_loaded = loaded


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    if not is_peft_available():
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
    }


def _plain_layer(layer: Any) -> nn.Module:
    from peft.utils.other import ModulesToSaveWrapper

    adapted = not layer.disable_adapters
    if isinstance(layer, ModulesToSaveWrapper):
        names = [name for name in layer.active_adapters if name in layer.modules_to_save]
        return layer.modules_to_save[names[0]] if adapted and names else layer.original_module
    if adapted == layer.merged:
        return layer.get_base_layer()
    layer = copy.deepcopy(layer)
    if adapted:
        layer.merge()
    else:
        layer.unmerge()
    return layer.get_base_layer().cpu()


@contextmanager
def _config_of_live_adapter(model: Any) -> Iterator[None]:
    """For the time of a save, make the configuration of the active adapter say what its layers do; warn of the rest.

    Raises:
        ValueError: if several adapters are active.
    """
    active = model.active_adapters()
    if len(active) > 1:
        raise ValueError(
            f"The adapters {', '.join(active)} are active, but a folder holds one: nothing was saved. Save one after "
            "the other, each after `set_adapter(name)`; or merge them into the weights, as the pipeline's "
            "`save_pretrained` does."
        )
    name = active[0]
    logger.warning(_what_is_not_saved(model, name))
    config = model.peft_config[name]
    model.peft_config[name] = live_config(model, name)
    try:
        yield
    finally:
        model.peft_config[name] = config


def _what_is_not_saved(model: Any, name: str) -> str:
    layers = _adapted_layers(model).values()
    base = model.peft_config[name].base_model_name_or_path
    origin = f"is to be loaded from '{base}'" if base else "has no name to be loaded from: save it apart"
    lost = [f"the base model, which {origin}"]
    lost += [f"the adapter '{other}'" for other in model.peft_config if other != name]
    if any(layer.disable_adapters for layer in layers):
        lost.append("that adapters are disabled: they will be enabled")
    merged = {other for layer in layers for other in getattr(layer, "merged_adapters", [])}
    if merged - {name}:
        lost.append(f"the merged weights of {', '.join(sorted(merged - {name}))}")
    return f"Only the adapter '{name}' is saved, as the library does. Not saved: {'; '.join(lost)}."


def live_config(model: Any, adapter_name: str) -> Any:
    """
    Configuration that makes a saved adapter as strong as it is now: weights set at run time and hot-swapped ranks and
    alphas count in.

    Args:
        model (`PreTrainedModel`): A model with the adapter.
        adapter_name (`str`): Name of the adapter.

    Returns:
        `peft.PeftConfig`: the adapter's own one if it says so already, else a changed copy.
    """
    from peft.tuners.lora import LoraLayer

    config = model.peft_config[adapter_name]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    as_configured = True
    for name, layer in _adapted_layers(model).items():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        rank, scaling = layer.lora_A[adapter_name].weight.shape[0], float(layer.scaling[adapter_name])
        ranks[name] = rank
        alphas[name] = scaling * (math.sqrt(rank) if config.use_rslora else rank)
        configured_rank, configured_alpha = configured_strength(config, name)
        as_configured &= rank == configured_rank and math.isclose(alphas[name], configured_alpha, rel_tol=1e-6)
    if as_configured:
        return config
    config = copy.copy(config)
    for key, value in strength_settings(ranks, alphas).items():
        setattr(config, key, value)
    return config


def configured_strength(config: Any, module_name: str) -> tuple[int, float]:
    """Rank and alpha that a `LoraConfig` gives to a module."""
    from peft.utils.other import get_pattern_key

    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module_name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module_name), config.lora_alpha)
    return rank, alpha


def strength_settings(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """Arguments of `LoraConfig` for a rank and an alpha of each module."""

    def split(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        common = Counter(values.values()).most_common(1)[0][0]
        return common, {f"^{re.escape(name)}": value for name, value in values.items() if value != common}

    rank, rank_pattern = split(ranks)
    alpha, alpha_pattern = split(alphas)
    return {"r": rank, "rank_pattern": rank_pattern, "lora_alpha": alpha, "alpha_pattern": alpha_pattern}


__all__ = ["LORA_TARGETS", "BagelAdapterMixin"]
