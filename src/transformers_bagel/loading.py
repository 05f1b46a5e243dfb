# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""From a repository, a folder or a file to a model: which files, what they are called, and whether they fit."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import find_adapter_config_file, is_peft_available
from transformers.utils.hub import cached_files

from .checkpoints import (
    check_folder,
    check_layers,
    check_tensors,
    check_token_ids,
    check_values,
    json_value,
    listed,
    marker_ids,
    module_name,
    own_names,
    read_json,
)
from .errors import shown, some
from .files import HUB_ARGUMENTS, SETTINGS, TOKENIZER, find_file, folder_and_file, hub_arguments, place_of
from .packed import (
    default_dtype,
    df11_dtype,
    gguf_dtype,
    is_df11,
    is_gguf_config,
    load_df11,
    load_gguf_layers,
    open_weights,
    with_df11_weights,
    with_gguf_layers,
)
from .quantization import named_as_modules, spare_sensitive_layers
from .segments import SPECIAL_TOKENS
from .stored_tensors import StoredTensor
from .weights import Weights, check_kind, contents, find_weights, has_pickles


# Arguments of a model's `from_pretrained` that a configuration would take for its own.
_OF_THE_MODEL = (
    *("dtype", "torch_dtype", "quantization_config"),
    *("attn_implementation", "experts_implementation", "trust_remote_code"),
)

# Weights that only drawing needs, and those that only seeing needs.
GENERATION_WEIGHTS = r"_moe_gen\.|vae2llm\.|llm2vae\.|time_embedder\.|latent_pos_embed\."
UNDERSTANDING_WEIGHTS = r"vit_model\.|vision_tower\.|connector\.|vit_pos_embed\."


# Tables that others save with a model, and its VAE.
NO_WEIGHTS = (r"rotary_emb\.inv_freq$", r"^(encoder|decoder)\.")


class InstalledCodeMixin:
    """For classes that the library would take for code of a repository, and copy wherever they are saved."""

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Like the parent's for classes outside this package. Those inside stay what they are: installed code."""
        if cls.__module__.split(".")[0] != __name__.split(".")[0]:
            super().register_for_auto_class(*args, **kwargs)  # type: ignore[misc]  # of the class beside this mixin


def special_token_ids(path: str | os.PathLike, **hub: Any) -> dict[str, int]:
    """Ids of BAGEL's special tokens, found by name in the tokenizer's files. Absent tokens are left out."""
    ids: dict[str, int] = {}
    file = find_file(path, "tokenizer_config.json", **hub)
    try:
        if file is not None:
            for token_id, token in json_value(read_json(file), "added_tokens_decoder", dict, file).items():
                ids[token["content"]] = int(token_id)
        if (file := find_file(path, "tokenizer.json", **hub)) is not None:
            for token in json_value(read_json(file), "added_tokens", list, file):
                ids[token["content"]] = int(token["id"])
        elif (file := find_file(path, "vocab.json", **hub)) is not None:
            ids = read_json(file) | ids
    except (TypeError, KeyError) as error:
        raise ValueError(f"The added tokens in '{file}' must each have a `content` and an id.") from error
    return {key: ids[token] for key, token in SPECIAL_TOKENS.items() if token in ids}


def check_stated_ids(stated: Mapping[str, Any], name: str, path: str | os.PathLike, **hub: Any) -> None:
    """
    Refuse settings that give a special token another id than the tokenizer in `path` does.

    Args:
        stated (`Mapping[str, Any]`): Settings of this package.
        name (`str`): What the error calls them.
        path (`str` or `os.PathLike`), hub: See [`find_file`].

    Raises:
        ValueError: naming the key.
    """
    for key, token_id in special_token_ids(path, **hub).items():
        if stated.get(key, token_id) != token_id:
            raise ValueError(
                f"`{key}` in {name} is {shown(stated[key])}, and {SPECIAL_TOKENS[key]} is {token_id} in the tokenizer. Correct it."
            )


def weight_files(path: str | os.PathLike, weights: Weights, hub: dict[str, Any]) -> list[str]:
    """Local paths of the files of a checkpoint, downloaded."""
    if os.path.isdir(path):
        return [find_file(path, name, **hub) or name for name in weights.files]
    return cached_files(path, list(weights.files), **hub) or []


def rename_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Hook of `load_state_dict`: give the names of files in a state dict the module's own."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        own_name = prefix + module_name(name.removeprefix(prefix))
        if own_name != name:
            state_dict[own_name] = state_dict.pop(name)


def ignored_weights(visual_gen: bool, visual_und: bool) -> list[str]:
    """Patterns of the weights that a model without `visual_gen` or `visual_und` leaves in the files."""
    patterns = [*NO_WEIGHTS] if visual_gen else [*NO_WEIGHTS, GENERATION_WEIGHTS]
    return patterns if visual_und else [*patterns, UNDERSTANDING_WEIGHTS]


class BagelLoadingMixin:
    """Loading that compares a checkpoint with the model before it reads a tensor, and maps no file into memory."""

    # Position tables are computed where a file lacks them.
    _keys_to_ignore_on_load_missing = [r"(latent|vit)_pos_embed\.pos_embed$"]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """
        As [`PreTrainedModel.from_pretrained`], also from the original layout.

        Files of safetensors are read, and not mapped: they may be larger than the memory. The library maps them where it
        must read them itself: those of a quantised checkpoint, of a model with an adapter in its repository, under
        DeepSpeed ZeRO-3, and those in which a `device_map` leaves weights on the disk, unless the system refuses to.

        Raises:
            OSError: if a file is missing or truncated.
            ValueError: if a setting cannot be right, if a tensor is missing, unexpected, misshapen or no floating
                numbers, before any is read; or if one holds numbers that are not finite, see [`check_values`].
        """
        path, load = pretrained_model_name_or_path, super().from_pretrained  # type: ignore[misc]  # of the class beside
        if path is None or kwargs.get("state_dict") is not None:
            return load(path, *model_args, config=config, **kwargs)
        path, named = _folder_and_name(path, kwargs)
        base, ignores_extra = kwargs.pop("base", None), kwargs.pop("ignore_unexpected_keys", False)
        check_folder(path, kwargs.get("subfolder") or "")
        hub = hub_arguments(path, kwargs)
        source, has_adapter = _base_model(path, kwargs.get("adapter_kwargs"), hub)
        source_hub = hub_arguments(source, hub)
        settings, settings_hub = place_of(source, base, SETTINGS, source_hub)
        config, kwargs = _settle_config(cls.config_class, source, config, named, base, kwargs, source_hub)  # type: ignore[attr-defined]
        is_quantized = getattr(config, "quantization_config", None) is not None
        weights = _find_weights(source, config, named, kwargs, source_hub)
        files = [] if is_quantized or weights is None else weight_files(source, weights, source_hub)
        check_token_ids(config, settings)
        tokenizer, tokenizer_hub = place_of(source, base, TOKENIZER, source_hub)
        if os.path.isdir(tokenizer):
            check_stated_ids(marker_ids(config), f"the config.json of '{settings}'", tokenizer, **tokenizer_hub)
        tensors = open_weights(files)
        is_compared = bool(tensors) and not kwargs.get("key_mapping")
        told_by = "its configuration" if settings == source else f"the configuration of `base` '{settings}'"
        if is_compared:
            check_kind(config, tensors, source)
            check_layers(config, tensors, source, told_by)
        empty = _empty_model(cls, config, model_args, kwargs)
        quantization = kwargs.get("quantization_config")
        kwargs["dtype"] = _settle_dtype(kwargs.get("dtype"), config, tensors, empty, quantization)
        in_df11 = is_df11(tensors)
        packed: dict[str, Any] = {}
        if in_df11:
            tensors = with_df11_weights(tensors, config.dfloat11_config, empty, source)
        # What has a place in a file, as others unpack.
        stored = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, StoredTensor)}
        if is_compared:
            ignored = (kwargs.get("ignore_mismatched_sizes", False), ignores_extra)
            check_tensors(empty, tensors, source, *ignored, told_by)
            looked_at = [part for name in own_names(empty, tensors) for part in _parts(tensors[name])]
            check_values({part.name: part for part in looked_at}, source)
        if is_gguf_config(quantization):
            compute_dtype = as_dtype(kwargs.get("dtype"), config)
            tensors, packed = with_gguf_layers(tensors, empty, compute_dtype, source)
            del kwargs["quantization_config"]
        elif quantization is not None and not is_quantized:
            kwargs["quantization_config"] = spare_sensitive_layers(kwargs["quantization_config"], empty)
        if empty.can_generate() and kwargs.get("generation_config") is None:
            kwargs["generation_config"] = _generation_config(settings, config, settings_hub)

        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["output_loading_info"] = True
        if (
            has_adapter
            or not tensors
            or is_deepspeed_zero3_enabled()
            or (len(stored) == len(tensors) and _stays_in_files(kwargs.get("device_map"), files))
        ):
            model, info = load(path, *model_args, config=config, **hub, **kwargs)
        else:
            vars(config).pop("transformers_weights", None)
            model, info = load(None, *model_args, config=config, state_dict=tensors, **kwargs)
            for module in model.modules():
                if getattr(module, "config", None) is model.config:
                    module.config.name_or_path = module.name_or_path = str(path)
        # Quantisers add tensors of their own, which no file has.
        if (missing := sorted(info["missing_keys"] & empty.state_dict().keys())) and not has_adapter:
            raise ValueError(f"The checkpoint '{source}' lacks {listed(missing)}. Download it again.")
        if in_df11:
            load_df11(model, os.path.dirname(files[0]))
        if packed:
            load_gguf_layers(model, packed, model.dtype)
        return (model, info) if wants_info else model


def _parts(tensor: Any) -> tuple[StoredTensor, ...]:
    return (tensor,) if isinstance(tensor, StoredTensor) else tensor.parts


def _settle_dtype(dtype: Any, config: Any, tensors: dict[str, Any], model: Any, quantization: Any) -> Any:
    """What `from_pretrained` is told of the type, or, if neither it nor the configuration names one, that of the files."""
    if is_df11(tensors):
        return df11_dtype(dtype)
    if is_gguf_config(quantization):
        dtype = gguf_dtype(quantization, dtype)
    if tensors and dtype in (None, "auto") and getattr(config.dtype, "itemsize", 1) == 1:
        # Tables of the code and buffers of quantising tools are of types of their own.
        return default_dtype({name: tensors[name] for name in own_names(model, tensors)} or tensors)
    return dtype


def as_dtype(dtype: Any, config: Any) -> torch.dtype:
    """The type in which a model is loaded, of what `from_pretrained` is told and its configuration says."""
    dtype = config.dtype if dtype in (None, "auto") else dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.get_default_dtype()


def _base_model(
    path: str | os.PathLike, adapter_kwargs: dict[str, Any] | None, hub: dict[str, Any]
) -> tuple[str | os.PathLike, bool]:
    """Where the weights of a repository are, and whether an adapter is to be loaded on top of them."""
    if adapter_kwargs and adapter_kwargs.keys() - set(HUB_ARGUMENTS):
        # An Auto class has found the adapter already.
        return path, True
    adapter = find_adapter_config_file(path, **(hub | (adapter_kwargs or {}))) if is_peft_available() else None
    if adapter is None:
        return path, False
    holds_model = os.path.isfile(os.path.join(path, "config.json"))
    return path if holds_model else read_json(adapter)["base_model_name_or_path"], True


def _folder_and_name(path: str | os.PathLike, kwargs: dict[str, Any]) -> tuple[str | os.PathLike, str | None]:
    """Where weights are, and the name of their file if the user gives one: in the path, or as the library takes it."""
    gguf = kwargs.pop("gguf_file", None)
    if gguf is not None and os.path.isfile(gguf):
        # Elsewhere than the settings, as the library takes it, too.
        kwargs.setdefault("base", path)
        path, gguf = folder_and_file(gguf)
    names = [name for name in (kwargs.pop("transformers_weights", None), gguf) if name]
    path, own = folder_and_file(path)
    names = names if own is None else [*names, own]
    if len({*names}) > 1:
        raise ValueError(f"Two files of weights are named, {some(names)}. Name one.")
    return path, names[0] if names else None


def _find_weights(
    path: str | os.PathLike, config: Any, named: str | None, kwargs: dict[str, Any], hub: dict[str, Any]
) -> Weights | None:
    """See [`find_weights`]; `None` for pickles, which the library is left to look for. Their name is set in the configuration.

    Raises:
        OSError: if there are none.
    """
    if kwargs.get("use_safetensors") is False:
        return None
    # What was read elsewhere, such as in a base, says nothing of the files here.
    is_own = str(getattr(config, "name_or_path", "")) == str(path)
    stated = getattr(config, "transformers_weights", None) if is_own else None
    weights = find_weights(path, hub, named, kwargs.get("variant"), stated=stated)
    if weights is not None:
        config.transformers_weights = weights.name
    if weights is None and not has_pickles(path, hub):
        raise OSError(f"'{path}' holds no weights of a BAGEL; {contents(path, hub)}.")
    return weights


def _settle_config(
    config_class: Any,
    path: str | os.PathLike,
    config: Any,
    named: str | None,
    base: str | os.PathLike | None,
    kwargs: dict[str, Any],
    hub: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The configuration, and what of `kwargs` is left for the library."""
    kwargs = {name: value for name, value in kwargs.items() if name not in HUB_ARGUMENTS}
    if isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
    else:
        kept = {name: kwargs.pop(name) for name in _OF_THE_MODEL if name in kwargs}
        found = {"transformers_weights": named, "base": base}
        found = {
            name: value for name, value in found.items() if value is not None and hasattr(config_class, "correct")
        }
        config, kwargs = config_class.from_pretrained(
            path if config is None else config, return_unused_kwargs=True, **hub, **kwargs, **found
        )
        kwargs |= kept
    if getattr(config, "original_config", None) is not None:
        config.correct(path, **hub)
    if getattr(config, "quantization_config", None) is not None:
        config.quantization_config = named_as_modules(config.quantization_config)
    if kwargs.get("dtype") is None and "torch_dtype" in kwargs:
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    if isinstance(dtypes := kwargs.get("dtype"), dict):
        kwargs["dtype"] = next(
            (dtypes[name] for name in ("", "transformer", "text_config", "default") if name in dtypes), None
        )
    return config, kwargs


def _empty_model(cls: Any, config: Any, model_args: tuple, kwargs: dict[str, Any]) -> Any:
    accepted = inspect.signature(cls.__init__).parameters
    try:
        with torch.device("meta"), init.no_init_weights():
            return cls(copy.deepcopy(config), *model_args, **{key: kwargs[key] for key in accepted if key in kwargs})
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"No {cls.__name__} can be made of the configuration: {error!r}.") from error


def _generation_config(path: str | os.PathLike, config: Any, hub: dict[str, Any]) -> GenerationConfig:
    """The generation config of a repository. The special tokens are the tokenizer's, whatever the JSON says (original
    behaviour, point 6)."""
    if (file := find_file(path, "generation_config.json", **hub)) is None:
        generation_config = GenerationConfig.from_model_config(config)
    else:
        generation_config = _read_generation_config(path, file, hub)
    text_config = config.get_text_config()
    generation_config.bos_token_id = text_config.bos_token_id
    generation_config.pad_token_id = text_config.pad_token_id
    stops = generation_config.eos_token_id
    if text_config.eos_token_id not in (stops if isinstance(stops, list) else [stops]):
        generation_config.eos_token_id = text_config.eos_token_id
    return generation_config


def _read_generation_config(path: str | os.PathLike, file: str, hub: dict[str, Any]) -> GenerationConfig:
    read_json(file)
    try:
        generation_config = GenerationConfig.from_pretrained(path, **hub)
        for name in ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "max_length"):
            if not isinstance(value := getattr(generation_config, name, None), (int, float, type(None))):
                raise ValueError(f"`{name}` must be a number, got {shown(value)}")
        return generation_config
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"The generation_config.json of '{path}' cannot be used: {error}") from error


def _stays_in_files(device_map: Any, files: list[str]) -> bool:
    """Whether weights may stay on the disk in the files of the checkpoint, from which they are mapped when needed."""
    choices = ("auto", "balanced", "balanced_low_0", "sequential")
    on_disk = "disk" in device_map.values() if isinstance(device_map, dict) else device_map in choices
    try:
        # All at once, as the library does.
        _ = [safe_open(file, framework="pt") for file in files if on_disk]
    except (OSError, RuntimeError, MemoryError, SafetensorError):
        return False
    return on_disk
