# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Adapters: the layers that LoRA changes by default, float32 masters, hot-swapping, and saving that says what it omits."""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations import PeftAdapterMixin
from transformers.utils import is_peft_available, logging

from .destinations import destination
from .files import hub_arguments


logger = logging.get_logger(__name__)

# Anchored at the language model: the projections of the vision tower have the same names.
_LAYER = r"(?:(?:.*\.)?language_model\.|(?:base_model\.model\.)?)layers\.\d+\."

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")

# More than any Qwen2 has.
_MOST_LAYERS = 128


class LayerPattern(str):
    """
    A pattern of layers of both experts, or of one, in every decoder layer.

    Where peft takes a list, and no pattern, it takes whatever iterates: here the names of the layers, one by one, since
    their ends alone are also those of the vision tower.
    """

    parts: tuple[str, ...]

    @classmethod
    def of(cls, names: Iterable[str], experts: Iterable[str] = ("", "_moe_gen")) -> LayerPattern:
        """The pattern of layers that Qwen2 has by these names, of the experts with these endings."""
        parts = tuple(_of_expert(name, expert) for name in names for expert in experts)
        pattern = cls(rf"{_LAYER}(?:{'|'.join(map(re.escape, parts))})")
        pattern.parts = parts
        return pattern

    def __iter__(self) -> Iterator[str]:
        for index in range(_MOST_LAYERS):
            yield from (f"language_model.layers.{index}.{part}" for part in self.parts)


def _of_expert(name: str, expert: str) -> str:
    if name in _MLP:
        return f"mlp{expert}.{name}"
    return f"self_attn.{name}{expert}" if name in _ATTENTION else f"{name}{expert}"


# Patterns for `LoraConfig(target_modules=...)`: attention and MLP of the experts that draw, of those that understand,
# and of both.
LORA_TARGETS: dict[str, str] = {
    name: LayerPattern.of((*_ATTENTION, *_MLP), experts)
    for name, experts in (("gen", ("_moe_gen",)), ("und", ("",)), ("both", ("", "_moe_gen")))
}


def register_adapter_targets() -> None:
    """Let `LoraConfig()` without `target_modules` adapt both experts, and every other method of peft in both what it adapts
    in Qwen2. Without peft there is nothing to do."""
    if not is_peft_available():
        return
    from peft.utils import constants

    for name, mapping in vars(constants).items():
        if not re.fullmatch(r"TRANSFORMERS_MODELS_TO_\w+_MODULES_MAPPING", name) or "qwen2" not in mapping:
            continue
        is_lora = mapping is constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        targets = LORA_TARGETS["both"] if is_lora else LayerPattern.of(mapping["qwen2"])
        for model_type in ("bagel", "bagel_text"):
            mapping.setdefault(model_type, targets)


class BagelAdapterMixin(PeftAdapterMixin):
    """The library's adapter methods, with float32 masters (original behaviour, point 36), DoRA, and alphas that swap."""

    # None until hot-swapping is enabled, empty after the first adapter was made ready for it.
    _hotswap_preparation: dict[str, Any] | None = None

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """As [`transformers.integrations.PeftAdapterMixin.add_adapter`], which activates the adapter. Its weights are float32,
        whatever the model's are. Without `target_modules`, LoRA adapts `LORA_TARGETS["both"]`."""
        super().add_adapter(adapter_config, adapter_name)
        settle_adapter(self, adapter_name or "default")

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: dict[str, torch.Tensor] | None = None,
        *args: Any,
        hotswap: bool | Literal["auto"] = "auto",
        load_config: Any = None,
        allow_missing_layers: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        As [`transformers.integrations.PeftAdapterMixin.load_adapter`], with LoRA weights in float32, and DoRA. If it fails,
        the model is what it was before.

        A hot-swap, which returns `None`, keeps the parameters, as a compiled model needs it, and swaps alphas, too.

        Args:
            peft_model_id, adapter_name, peft_config, adapter_state_dict, hotswap, load_config, args, kwargs:
                As in the library.
            allow_missing_layers (`bool`, *optional*, defaults to `False`):
                Whether the adapter may lack layers that its settings name. These stay as they are.

        Raises:
            OSError: if a file is missing or truncated.
            ValueError: if the adapter lacks a tensor, or holds one that is unknown, misshapen or not finite, if its
                settings are out of bounds, or if the name is taken.
        """
        from .adapter_checks import fitting_adapter, read_config, read_weights

        adapter_name = adapter_name or "default"
        is_known = adapter_name in getattr(self, "peft_config", {})
        if hotswap == "auto":
            hotswap = is_known and self._hotswap_preparation is not None
        if is_known and not hotswap:
            raise ValueError(f"Adapter with name {adapter_name} already exists. Please use a different name.")
        if peft_model_id is None and load_config is not None:
            peft_model_id = load_config.pretrained_model_name_or_path
        label = f"The adapter '{peft_model_id or adapter_name}'"
        if peft_model_id is not None:
            given = getattr(load_config, "download_kwargs", {}) | kwargs | (kwargs.get("adapter_kwargs") or {})
            hub = hub_arguments(peft_model_id, given)
            if peft_config is None:
                peft_config = read_config(peft_model_id, hub)
            if adapter_state_dict is None:
                use_safetensors = kwargs.get("use_safetensors", getattr(load_config, "use_safetensors", None))
                adapter_state_dict = read_weights(peft_model_id, use_safetensors, hub)
        if peft_config is not None and adapter_state_dict is not None:
            peft_config, adapter_state_dict = fitting_adapter(
                self, peft_config, adapter_state_dict, label, allow_missing_layers
            )
        if hotswap and is_known and adapter_state_dict is not None:
            return _swap_adapter(self, adapter_name, peft_config, adapter_state_dict)
        # The library would round the weights to the model's dtype while it reads them.
        kwargs.setdefault("dtype_plan", {"lora_": torch.float32})
        # Files name DoRA's magnitudes without the last part, and the library would not find them.
        mapping = getattr(load_config, "weight_mapping", None) or get_model_conversion_mapping(self)
        magnitudes = WeightRenaming(r"(lora_magnitude_vector\.[^.]+)$", r"\1.weight")
        kwargs.setdefault("weight_mapping", [*mapping, magnitudes])
        with _undone_on_error(self, adapter_name):
            try:
                info = super().load_adapter(
                    None,
                    adapter_name,
                    peft_config,
                    adapter_state_dict,
                    *args,
                    hotswap=hotswap,
                    load_config=load_config,
                    **kwargs,
                )
            except (AttributeError, KeyError, TypeError) as error:
                raise ValueError(f"{label}: its settings cannot be used ({error!r}).") from error
            # What other adapters hold is missing, too, and their names may begin alike; AdaLoRA's counts are never saved.
            missing = {
                name for name in info.missing_keys if f".{adapter_name}." in f"{name}." and ".ranknum." not in name
            }
            if missing or info.unexpected_keys:
                raise ValueError(
                    f"{label} and its own settings name different layers: {sorted(missing)[:3]} are missing, "
                    f"{sorted(info.unexpected_keys)[:3]} unknown."
                )
            settle_adapter(self, adapter_name)
        if self._hotswap_preparation:
            from peft.utils.hotswap import prepare_model_for_compiled_hotswap

            prepare_model_for_compiled_hotswap(self, config=self.peft_config, **self._hotswap_preparation)
            self._hotswap_preparation = {}
        return info

    def enable_peft_hotswap(
        self, target_rank: int = 128, check_compiled: Literal["error", "warn", "ignore"] = "error"
    ) -> None:
        """See [`transformers.integrations.PeftAdapterMixin.enable_peft_hotswap`], whose rank is lost in 5.23."""
        super().enable_peft_hotswap(target_rank, check_compiled)
        self._hotswap_preparation = {"target_rank": target_rank, "check_compiled": check_compiled}

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """See [`transformers.integrations.PeftAdapterMixin.delete_adapter`]. The last one leaves plain layers."""
        keep_few_steps_of_merged(self, [adapter_names] if isinstance(adapter_names, str) else adapter_names)
        super().delete_adapter(adapter_names)
        remove_empty_layers(self)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As [`PreTrainedModel.save_pretrained`]: with an adapter of `add_adapter` or `load_adapter` only that adapter
        is written, at its present strength, and a warning tells what is not.

        Raises:
            OSError: if the folder is a file, or cannot be written to.
            ValueError: if several adapters are active, or if they are a `PeftModel`'s, before anything is written.
        """
        save_directory = os.path.expanduser(save_directory)
        destination(save_directory, "`save_directory`")
        if not adapted_layers(self):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        try:
            active = self.active_adapters()
        except ValueError as error:
            raise ValueError(
                "The model has layers of a PeftModel, whose names no model would know: nothing was saved. Save the "
                "PeftModel, or what its `merge_and_unload()` returns."
            ) from error
        if len(active) != 1:
            raise ValueError(
                f"The adapters {', '.join(active)} are active, but a folder holds one: nothing was saved. Save one "
                "after the other, each after `set_adapter(name)`."
            )
        config = self.peft_config[active[0]]
        logger.warning(_what_is_not_saved(self, active[0]))
        self.peft_config[active[0]] = live_config(self, active[0])
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.peft_config[active[0]] = config

    # diffusers passes on the arguments that the signature names.
    save_pretrained.__signature__ = inspect.signature(PreTrainedModel.save_pretrained)  # type: ignore[attr-defined]


def _swap_adapter(model: Any, adapter_name: str, config: Any, weights: dict[str, torch.Tensor]) -> None:
    from peft.utils.hotswap import check_hotswap_configs_compatible, hotswap_adapter_from_state_dict

    check_hotswap_configs_compatible(model.peft_config[adapter_name], config)
    hotswap_adapter_from_state_dict(model, lora_parameters(weights, adapter_name), adapter_name, config)
    # They were of the other one.
    adapter_notes(model, adapter_name).clear()


def adapter_notes(model: Any, adapter_name: str) -> dict[str, Any]:
    """What is known of an adapter beside the settings that peft has: `few_steps`, how it wants to be drawn with, and
    `merged_strength`. The notes lie with the settings, and go with them."""
    return vars(model.peft_config[adapter_name]).setdefault("notes", {})


def merged_adapters(model: nn.Module) -> set[str]:
    """Names of the adapters that are in the weights of some layer."""
    return {name for layer in adapted_layers(model).values() for name in getattr(layer, "merged_adapters", [])}


def keep_few_steps_of_merged(model: Any, adapter_names: Iterable[str]) -> None:
    """Write into the configuration how the first of these adapters wants to be drawn with that is in the weights and was made for few
    steps: the adapters go, and what was merged of them stays."""
    merged = merged_adapters(model)
    for name in adapter_names:
        notes = adapter_notes(model, name) if name in merged else {}
        if notes.get("few_steps") is not None and notes.get("merged_strength", 1.0):
            model.config.few_steps = notes["few_steps"].merged()
            return


def settle_adapter(model: nn.Module, adapter_name: str) -> None:
    """Make a new adapter float32, and its dropout train only if the model does."""
    from peft.functional import cast_adapter_dtype

    cast_adapter_dtype(model, adapter_name)
    if not model.training:
        model.eval()


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Layers of peft in a model, by name."""
    if not is_peft_available():
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def remove_empty_layers(model: nn.Module) -> None:
    """Put plain layers in the place of those that hold no adapter any more."""
    from peft.utils import ModulesToSaveWrapper

    for name, layer in adapted_layers(model).items():
        if isinstance(layer, ModulesToSaveWrapper):
            if not layer.modules_to_save:
                model.set_submodule(name, layer.original_module)
        elif not any(getattr(layer, part, None) for part in layer.adapter_layer_names):
            model.set_submodule(name, layer.get_base_layer())


@contextmanager
def _undone_on_error(transformer: Any, adapter_name: str | None) -> Iterator[None]:
    """If something fails, take the new adapter out again."""
    active = [(layer, list(layer.active_adapters)) for layer in adapted_layers(transformer).values()]
    trainable = [(parameter, parameter.requires_grad) for parameter in transformer.parameters()]
    modules = dict(transformer.named_modules())
    try:
        yield
    except BaseException:
        if adapter_name in getattr(transformer, "peft_config", {}):
            transformer.delete_adapter(adapter_name)
        else:
            # The injection ended in the middle.
            for layer in adapted_layers(transformer).values():
                layer.delete_adapter(adapter_name)
        for name, module in modules.items():
            if transformer.get_submodule(name) is not module:
                transformer.set_submodule(name, module)
        for layer, names in active:
            layer.set_adapter(names)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise


def lora_parameters(weights: dict[str, torch.Tensor], adapter_name: str) -> dict[str, torch.Tensor]:
    """LoRA weights by their names in the module tree: between part and parameter stands the adapter's. The magnitudes
    of DoRA are saved without the name of their parameter."""

    def inside(found: re.Match) -> str:
        return f"{found[1]}.{adapter_name}{found[2] or '.weight'}"

    return {
        re.sub(r"(\.lora_[^.]+)(.*)$", inside, name.removeprefix("base_model.model."), count=1): tensor
        for name, tensor in weights.items()
    }


def _what_is_not_saved(model: Any, name: str) -> str:
    base = model.peft_config[name].base_model_name_or_path
    lost = [f"the base model, which {f'is to be loaded from {base!r}' if base else 'has no name: save it apart'}"]
    lost += [f"the adapter '{other}'" for other in model.peft_config if other != name]
    if adapter_notes(model, name).get("few_steps"):
        lost.append("the steps that it was made for, which the pipeline's `save_lora_weights` takes as `few_steps`")
    layers = adapted_layers(model).values()
    if any(layer.disable_adapters for layer in layers):
        lost.append("that adapters are disabled: they will be enabled")
    if merged := merged_adapters(model) - {name}:
        lost.append(f"the merged weights of {', '.join(sorted(merged))}")
    return f"Only the adapter '{name}' is saved, as the library does. Not saved: {'; '.join(lost)}."


def live_config(model: Any, adapter_name: str) -> Any:
    """The `peft.PeftConfig` that makes a saved adapter as strong as it is now: weights set at run time and hot-swapped
    ranks and alphas count in. It is the adapter's own one if that says so already."""
    from peft.tuners.lora import LoraLayer

    config = model.peft_config[adapter_name]
    ranks, alphas = {}, {}
    for name, layer in adapted_layers(model).items():
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
            ranks[name] = rank = layer.lora_A[adapter_name].weight.shape[0]
            alphas[name] = float(layer.scaling[adapter_name]) * (math.sqrt(rank) if config.use_rslora else rank)
    configured = {name: configured_strength(config, name) for name in ranks}
    if all(
        rank == ranks[name] and math.isclose(alpha, alphas[name], rel_tol=1e-6)
        for name, (rank, alpha) in configured.items()
    ):
        return config
    config = copy.copy(config)
    vars(config).update(strength_settings(ranks, alphas))
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
