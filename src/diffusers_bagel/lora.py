# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""LoRA in the pipeline: diffusers' interface over the model's own peft layers."""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import LogRecord, getLogger
from typing import Any

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from diffusers.utils import is_peft_available, logging
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.integrations import PeftAdapterMixin
from transformers.utils.peft_utils import find_adapter_config_file

from transformers_bagel.adapter_checks import PEFT_PREFIX, adapter_config, check_settings, other_tensors
from transformers_bagel.adapters import (
    adapted_layers,
    adapter_notes,
    keep_few_steps_of_merged,
    merged_adapters,
    strength_settings,
)
from transformers_bagel.checkpoints import module_name, read_json
from transformers_bagel.destinations import destination
from transformers_bagel.errors import shown
from transformers_bagel.files import HUB_ARGUMENTS
from transformers_bagel.weights import check_no_model

from .adapter_scale import lora_layers
from .few_steps import (
    FewSteps,
    few_steps_in_effect,
    few_steps_of,
    note_strength_of_merged,
    values_of,
    without_few_steps,
)


logger = logging.get_logger(__name__)

DIFFUSERS_PREFIX = "transformer."
SOURCE = "`pretrained_model_name_or_path_or_dict`"
# Initialisations that take out of the base model what they put into the LoRA.
CHANGED_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")
SOURCES = (
    "a Hub id, a folder with pytorch_lora_weights.safetensors or adapter_model.safetensors, such a file, or a dict of "
    "tensors"
)


class BagelLoraLoaderMixin(LoraBaseMixin):
    """Load, weigh, fuse, swap and save LoRA layers of the pipeline's `transformer`."""

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    transformer: Any

    @property
    def few_steps(self) -> FewSteps | None:
        """How the adapter that is active or fused wants to be drawn with, if it was made for few steps; else one that is in the
        weights. Of several it is the first one's."""
        return self.few_steps_of(None)

    def few_steps_of(self, attention_kwargs: dict[str, Any] | None) -> FewSteps | None:
        """`few_steps` of a call, whose `scale` of 0 leaves out adapters that are not fused."""
        return few_steps_of(self.transformer, attention_kwargs)

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        return_lora_metadata: bool = False,
        weight_name: str | None = None,
        use_safetensors: bool | None = None,
        **hub: Any,
    ) -> Any:
        """
        Read LoRA weights in diffusers' file format or in peft's.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                Hub id, folder, file, or the tensors. Names start with `transformer.`, `base_model.model.`, or a module.
            return_lora_metadata (`bool`, *optional*, defaults to `False`): Whether to return the settings, too.
            weight_name (`str`, *optional*): File in the folder.
            use_safetensors (`bool`, *optional*): `True` reads no pickled file, `False` no other; by default either.
            hub: `subfolder`, `revision`, `token` and so on, as in [`DiffusionPipeline.from_pretrained`].

        Returns:
            `dict[str, torch.Tensor]`, names starting with `transformer.`; with `return_lora_metadata` also the
            arguments of the `LoraConfig` (`dict` with keys starting with `transformer.`, and those of
            [`~few_steps.FewSteps`] with `few_steps.`), or `None` where the file does not hold them. Then alpha equals the
            rank, and alphas among the tensors are multiplied in.

        Raises:
            OSError: if there are no such weights.
            TypeError: if the argument is of another type.
            ValueError: if an `.alpha` is no number or stands alone, or if a tensor is there twice.
        """
        if not isinstance(pretrained_model_name_or_path_or_dict, (str, os.PathLike, dict)):
            raise TypeError(f"{SOURCE} must be {SOURCES}, got {type(pretrained_model_name_or_path_or_dict).__name__}.")
        if isinstance(pretrained_model_name_or_path_or_dict, (str, os.PathLike)):
            place = pretrained_model_name_or_path_or_dict
            check_no_model(place, weight_name, {name: value for name, value in hub.items() if value is not None})
        hub = dict.fromkeys(HUB_ARGUMENTS) | hub
        try:
            state_dict, metadata = _fetch_state_dict(
                pretrained_model_name_or_path_or_dict,
                weight_name=weight_name,
                use_safetensors=use_safetensors is not False,
                allow_pickle=use_safetensors is None,
                user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
                **hub,
            )
        except (OSError, ValueError, IndexError, RecursionError, SafetensorError) as error:
            raise OSError(
                f"{SOURCE}: no LoRA weights at {str(pretrained_model_name_or_path_or_dict)!r} ({error}). It must be "
                f"{SOURCES}."
            ) from error
        settings = without_few_steps(metadata)
        if settings is None and any(name.startswith(PEFT_PREFIX) for name in state_dict):
            settings = _read_peft_config(pretrained_model_name_or_path_or_dict, weight_name, hub)
            if settings is not None:
                metadata = settings | (metadata or {})
        # Files trained with the original code have the original names.
        named = {
            module_name(name.removeprefix(DIFFUSERS_PREFIX).removeprefix(PEFT_PREFIX)): tensor
            for name, tensor in state_dict.items()
        }
        if len(named) < len(state_dict):
            raise ValueError(f"{SOURCE} holds a tensor twice, by its original name and by that of this package.")
        weights = _without_alphas(named, multiply=settings is None)
        weights = {f"{DIFFUSERS_PREFIX}{name}": tensor for name, tensor in weights.items()}
        return (weights, metadata) if return_lora_metadata else weights

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        allow_missing_layers: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Load a LoRA into the transformer and activate it. If that fails, the transformer is what it was before.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                See [`BagelLoraLoaderMixin.lora_state_dict`].
            adapter_name (`str`, *optional*, defaults to `"default_0"` and so on): Name of the adapter.
            hotswap (`bool`, *optional*, defaults to `False`):
                Whether to put the weights in the place of the adapter `adapter_name`.
            low_cpu_mem_usage (`bool`, *optional*, defaults to `True`): As in diffusers.
            allow_missing_layers (`bool`, *optional*, defaults to `False`):
                Whether the LoRA may lack layers that its settings name. These stay as they are.
            kwargs: Other arguments of [`BagelLoraLoaderMixin.lora_state_dict`].

        Raises:
            OSError: if there are no such weights.
            ValueError: if peft is missing, if the weights do not fit, or the name is taken (with `hotswap`: unknown).
        """
        if not is_peft_available():
            raise ValueError("`load_lora_weights` needs peft: `pip install peft`.")
        _check_is_model(getattr(self.transformer, "_orig_mod", self.transformer))
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        few_steps = FewSteps.from_metadata(metadata, SOURCE)
        # Before its layers are others.
        is_of_this_model = few_steps is None or few_steps.is_of(values_of(self.transformer))
        before = set(getattr(self.transformer, "peft_config", {}))
        self.load_lora_into_transformer(
            state_dict,
            self.transformer,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
            allow_missing_layers=allow_missing_layers,
        )
        # Another than the one that was asked for only where none was.
        name = str(next(iter(set(self.transformer.peft_config) - before), adapter_name))
        if few_steps is not None:
            is_active = name in few_steps_in_effect(self.transformer)
            few_steps.introduce(name, is_of_this_model, is_active, self.scheduler)

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: dict[str, torch.Tensor],
        transformer: Any,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: dict[str, Any] | None = None,
        allow_missing_layers: bool = False,
    ) -> None:
        """See [`BagelLoraLoaderMixin.load_lora_weights`]; takes what `lora_state_dict` returns."""
        transformer = getattr(transformer, "_orig_mod", transformer)  # of a compiled one
        _check_is_model(transformer)
        weights = {name.removeprefix(DIFFUSERS_PREFIX): tensor for name, tensor in state_dict.items()}
        config = lora_config(weights, metadata, transformer.name_or_path)
        few_steps = FewSteps.from_metadata(metadata, SOURCE)
        adapters = getattr(transformer, "peft_config", {})
        if adapter_name is None and not hotswap:
            names = (f"default_{index}" for index in itertools.count(len(adapters)))
            adapter_name = next(name for name in names if name not in adapters)
        if hotswap != (adapter_name in adapters):
            raise ValueError(
                f"`adapter_name` must be {'one' if hotswap else 'none'} of the loaded adapters {sorted(adapters)} with "
                f"hotswap={hotswap}, got {adapter_name!r}."
            )
        with _without_offloading(_pipeline, transformer), _without_report():
            try:
                transformer.load_adapter(
                    adapter_name=adapter_name,
                    adapter_state_dict=weights,
                    peft_config=config,
                    hotswap=hotswap,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    is_trainable=not config.inference_mode,
                    allow_missing_layers=allow_missing_layers,
                )
            except ValueError as error:
                raise ValueError(f"{SOURCE}: {error} Nothing was loaded.") from error
        adapter_notes(transformer, str(adapter_name))["few_steps"] = few_steps

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        few_steps: FewSteps | None = None,
    ) -> None:
        """
        Write LoRA weights in diffusers' file format.

        Args:
            save_directory (`str` or `os.PathLike`): Folder; created if it is not there.
            transformer_lora_layers (`dict[str, torch.Tensor]`): As from `peft.get_peft_model_state_dict`.
            weight_name (`str`, *optional*, defaults to `"pytorch_lora_weights.safetensors"`): Name of the file.
            save_function (`Callable`, *optional*): Called as `save_function(weights, path)` to write the file.
            is_main_process, safe_serialization: As in diffusers.
            transformer_lora_adapter_metadata (`dict`, *optional*):
                `LoraConfig.to_dict()`. Without it the file does not hold alpha, and readers take the rank for it.
            few_steps ([`FewSteps`], *optional*): How the adapter wants to be drawn with.

        Raises:
            OSError: if the folder is a file, or cannot be written to.
            ValueError: if there are no layers.
        """
        if not transformer_lora_layers:
            raise ValueError(
                "`transformer_lora_layers` must hold the weights, as `peft.get_peft_model_state_dict(pipe.transformer, "
                "adapter_name=...)` returns them."
            )
        if not transformer_lora_adapter_metadata:
            logger.warning(
                "Without `transformer_lora_adapter_metadata` the file does not say alpha: it will be read as the rank. "
                "Pass `pipe.transformer.peft_config[adapter_name].to_dict()`."
            )
        metadata = {
            f"{DIFFUSERS_PREFIX}{key}": value for key, value in (transformer_lora_adapter_metadata or {}).items()
        }
        if few_steps is not None:
            metadata |= few_steps.metadata()
        cls.write_lora_layers(
            state_dict=cls.pack_weights(transformer_lora_layers, cls.transformer_name),
            save_directory=destination(save_directory, "`save_directory`"),
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
            lora_adapter_metadata=metadata or None,
        )

    def fuse_lora(self, components: list[str] = ["transformer"], *args: Any, **kwargs: Any) -> None:  # noqa: B006
        """See [`~loaders.LoraBaseMixin.fuse_lora`]."""
        _check_is_model(self.transformer)
        scalings = {layer: dict(layer.scaling) for layer in lora_layers(self.transformer)}
        # A second fuse must not take the scale of the first one for the adapters' own.
        self._unfused_scalings = scalings | getattr(self, "_unfused_scalings", {})
        before = merged_adapters(self.transformer)
        super().fuse_lora(components, *args, **kwargs)
        note_strength_of_merged(self.transformer, but=before)

    def unfuse_lora(self, components: list[str] = ["transformer"], **kwargs: Any) -> None:  # noqa: B006
        """See [`~loaders.LoraBaseMixin.unfuse_lora`]. The `lora_scale` of the fuse is forgotten, too."""
        _check_is_model(self.transformer)
        super().unfuse_lora(components, **kwargs)
        for layer, scaling in self.__dict__.pop("_unfused_scalings", {}).items():
            layer.scaling.update({name: value for name, value in scaling.items() if name in layer.scaling})

    def unload_lora_weights(self) -> None:
        """Remove all adapters. What was fused stays in the weights, and of few steps in `transformer.config.few_steps`."""
        _check_is_model(self.transformer)
        self.__dict__.pop("_unfused_scalings", None)
        keep_few_steps_of_merged(self.transformer, list(getattr(self.transformer, "peft_config", {})))
        super().unload_lora_weights()

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """See [`~loaders.LoraBaseMixin.set_adapters`]."""
        super().set_adapters(adapter_names, adapter_weights)
        if len(found := list(few_steps_in_effect(self.transformer))) > 1:
            logger.warning(
                f"The adapters {', '.join(map(repr, found))} were each made for few steps: drawings have those of '{found[0]}'."
            )

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """See [`~loaders.LoraBaseMixin.delete_adapters`]. The last one leaves plain layers."""
        _check_is_model(self.transformer)
        self.transformer.delete_adapter(adapter_names)

    def enable_lora_hotswap(self, **kwargs: Any) -> None:
        """Prepare for adapters up to a rank of `target_rank` (128), and for a compiled transformer, before the first load.
        See [`transformers.integrations.PeftAdapterMixin.enable_peft_hotswap`]."""
        self.transformer.enable_peft_hotswap(**kwargs)


def check_no_adapters(transformer: torch.nn.Module) -> None:
    """
    Raises:
        ValueError: if the transformer has layers of peft, which a pipeline's folder cannot hold.
    """
    if adapted_layers(transformer):
        names = ", ".join(getattr(transformer, "peft_config", {}))
        raise ValueError(
            f"The transformer has adapters ({names}), which a pipeline's folder cannot hold: nothing was saved. Merge "
            "them with `fuse_lora()` and `unload_lora_weights()`, or drop them with `unload_lora_weights()` alone; "
            "`save_lora_weights` saves one apart. Of a PeftModel, take what `merge_and_unload()` returns."
        )


def _check_is_model(transformer: Any) -> None:
    if not isinstance(transformer, PreTrainedModel):
        raise TypeError(
            f"The pipeline's `transformer` is a {type(transformer).__name__}, whose adapters are its own: set "
            "`pipe.transformer` to the model inside it, `get_base_model()` of a PeftModel or `_orig_mod` of a compiled one."
        )


def _module_of(name: str) -> str:
    return name.rsplit(".lora_", 1)[0]


def _read_peft_config(source: Any, weight_name: str | None, hub: dict[str, Any]) -> dict[str, Any] | None:
    """The `adapter_config.json` beside weights in peft's format, with keys as in diffusers' metadata."""
    file = None
    if not isinstance(source, dict):
        folder = os.path.dirname(source) if os.path.isfile(source) else source
        subfolder = os.path.join(hub["subfolder"] or "", os.path.dirname(weight_name or ""))
        arguments = {key: value for key, value in hub.items() if value is not None}
        file = find_adapter_config_file(folder, **(arguments | {"subfolder": subfolder}))
    if file is None:
        logger.warning(
            f"{SOURCE} has weights in peft's format without adapter_config.json, which holds `lora_alpha`: alpha is "
            "taken to be the rank. Pass the folder that holds both."
        )
        return None
    settings = read_json(file)
    check_settings(settings, SOURCE)
    return {f"{DIFFUSERS_PREFIX}{key}": value for key, value in settings.items()}


def _without_alphas(weights: dict[str, torch.Tensor], multiply: bool) -> dict[str, torch.Tensor]:
    """Weights without `.alpha` tensors. These are multiplied in where nothing else tells alpha: it is the rank then."""
    alphas = {name: tensor for name, tensor in weights.items() if name.endswith(".alpha")}
    plain = {name: tensor for name, tensor in weights.items() if name not in alphas}
    for name, alpha in alphas.items():
        output = name.removesuffix("alpha") + "lora_B.weight"
        if alpha.numel() != 1 or output not in plain or plain[output].ndim != 2 or not plain[output].numel():
            raise ValueError(f"{SOURCE}: {name} must be a number, beside a matrix {output}.")
        if multiply:
            plain[output] = plain[output].float() * (float(alpha) / plain[output].shape[1])
    return plain


def lora_config(
    weights: dict[str, torch.Tensor], metadata: dict[str, Any] | None, base_model: str | None, label: str = SOURCE
) -> Any:
    """
    `peft.LoraConfig` of LoRA weights, by the name of their module, and of the settings that
    [`BagelLoraLoaderMixin.lora_state_dict`] returns beside them: without these, alpha is the rank.

    Raises:
        ValueError: if the settings are out of bounds or of another kind of adapter, say that there are whole modules
            beside, or belong to a base model that was changed before the training.
    """

    if others := [name for name in weights if ".lora_" not in name]:
        raise ValueError(
            f"{label} must hold LoRA weights of the transformer's layers, the linear ones, but it holds "
            f"{', '.join(others[:3])}. Other kinds of adapters, and LoRA with whole modules beside it, load with "
            "`pipe.transformer.load_adapter`."
        )
    ranks = {
        _module_of(name): len(tensor)
        for name, tensor in weights.items()
        if name.endswith(".lora_A.weight") and tensor.ndim == 2
    }
    if (settings := without_few_steps(metadata)) is not None:
        check_settings(settings, label)
        settings = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in settings.items()}
    else:
        settings = (
            {}
            if not ranks
            else strength_settings(ranks, dict(ranks))
            | {
                "target_modules": sorted({_module_of(name) for name in weights}),
                "use_dora": any("lora_magnitude_vector" in name for name in weights),
                "lora_bias": any(name.endswith(".lora_B.bias") for name in weights),
            }
        )
    config = adapter_config(settings, label)
    if others := other_tensors(config):
        said = ", ".join(f"{name}={shown(getattr(config, name))}" for name in others)
        raise ValueError(
            f"{label}: its settings say {said}, but only plain LoRA is loaded here. Use `pipe.transformer.load_adapter`."
        )
    if str(config.init_lora_weights).startswith(CHANGED_BASES):
        raise ValueError(
            f"{label}: its settings say init_lora_weights={config.init_lora_weights!r}, which changed the base model "
            "before the training. Save it with peft's `path_initial_model_for_weight_conversion`."
        )
    config.base_model_name_or_path = base_model
    return config


@contextmanager
def _without_offloading(pipeline: Any, transformer: Any) -> Iterator[None]:
    """Bring offloaded layers back for a while: what is put beside them must lie where they do."""
    places = set(getattr(transformer, "hf_device_map", {}).values())
    is_offloaded = any(weight.is_meta for weight in transformer.parameters())
    if (len(places) > 1 and places & {"cpu", "disk"}) or (is_offloaded and pipeline is None):
        raise ValueError(
            "The transformer's layers are offloaded by its `device_map`: nothing was loaded. Load the transformer "
            "without a `device_map`, and call `pipe.enable_model_cpu_offload()`."
        )
    if is_offloaded:
        device = pipeline._execution_device
        pipeline.remove_all_hooks()
    try:
        yield
    finally:
        if is_offloaded:
            pipeline.enable_sequential_cpu_offload(device=device)
        _maybe_remove_and_reapply_group_offloading(transformer)


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence the library for this thread: it would report that other adapters' weights were made anew. They are not."""
    thread = threading.get_ident()

    def is_of_another_thread(record: LogRecord) -> bool:
        return record.thread != thread

    reports = getLogger(PeftAdapterMixin.__module__)
    reports.addFilter(is_of_another_thread)
    try:
        yield
    finally:
        reports.removeFilter(is_of_another_thread)
