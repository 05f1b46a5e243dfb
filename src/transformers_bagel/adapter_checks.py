# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What an adapter must hold, and what its settings may say: looked at before a layer of the model is touched.

Settings come from anybody. The layers that they name are found by [`Names`], and what is handed on to the libraries holds no
pattern whose search might never end.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .adapters import LORA_TARGETS, adapted_layers, configured_strength
from .checkpoints import WEIGHT_RENAMINGS, is_finite, module_name, read_json
from .errors import shown, some
from .files import find_file
from .patterns import LONGEST_PATTERN, Names


SETTINGS_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_PREFIX = "base_model.model."

# BAGEL has some 600 layers. Files name each at most a few times.
MOST_ENTRIES = 5_000
LARGEST_ALPHA = 1e6
# The libraries compare each of them with each layer.
FEW_NAMES = 100
# A pattern without these matches in a time that grows with its length.
_REPETITIONS = re.compile(r"[*+?{|(\[]")
_PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules")
_STRENGTHS = ("rank_pattern", "alpha_pattern")
# What LoRA computes with, and may be left out, but not null.
_NEEDED = ("r", "lora_alpha", *_STRENGTHS, "bias", "lora_dropout")
# Adapters with one of these have other tensors than a pair a layer.
_OTHER_TENSORS = ("target_parameters", "trainable_token_indices", "modules_to_save", "use_qalora")


def _is_index(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_index(value) and int(value) > 0


def _is_alpha(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(float(value)) <= LARGEST_ALPHA


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_PATTERN


def _is_plain(value: Any) -> bool:
    return _is_name(value) and not _REPETITIONS.search(value)


def _are(kind: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, (list, tuple, set)) and len(values) <= MOST_ENTRIES and all(map(kind, values))


def _have(kind: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, dict) and _are(_is_name, list(values)) and all(map(kind, values.values()))


_NAMES = (lambda value: _is_name(value) or _are(_is_name, value), f"a text, or a list of at most {MOST_ENTRIES} texts")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_alpha, f"a number up to {LARGEST_ALPHA:.0e}"),
    "rank_pattern": (lambda value: _have(_is_rank, value), "a dict of names and positive integers"),
    "alpha_pattern": (lambda value: _have(_is_alpha, value), f"a dict of names and numbers up to {LARGEST_ALPHA:.0e}"),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "feedforward_modules": _NAMES,
    "modules_to_save": (lambda value: _are(_is_plain, value), "a list of names"),
    "layers_pattern": (lambda value: _is_plain(value) or _are(_is_plain, value), "a name, or a list of names"),
    "layers_to_transform": (lambda value: _is_index(value) or _are(_is_index, value), "an index, or a list of them"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "lora_dropout": (lambda value: _is_alpha(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "init_lora_weights": (lambda value: isinstance(value, bool) or _is_name(value), "true, false or a name"),
    "target_parameters": (lambda value: _are(_is_name, value), "a list of names"),
    "trainable_token_indices": (
        lambda value: _are(_is_index, value) or _have(lambda indices: _are(_is_index, indices), value),
        "a list of indices, or a dict of names and such lists",
    ),
    "use_dora": _FLAG,
    "use_rslora": _FLAG,
    "lora_bias": _FLAG,
    "fan_in_fan_out": _FLAG,
    # The one would make other layers of the base, the other import whatever it names.
    "layer_replication": (lambda value: not value, "left out"),
    "megatron_config": (lambda value: not value, "left out"),
}


def check_settings(settings: Any, label: str) -> None:
    """
    Refuse settings that no adapter of BAGEL has.

    Args:
        settings (`dict[str, Any]`): The arguments of a `peft.PeftConfig`.
        label (`str`): Whose they are, for errors.

    Raises:
        ValueError: naming the key.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"{label}: its settings must be a JSON object, got a {type(settings).__name__}.")
    is_lora = settings.get("peft_type", "LORA") == "LORA"
    # Other methods choose a rank by the size of their blocks, or while they train.
    needed = _NEEDED if is_lora else ()
    unset = None if is_lora else 0
    for key, (is_right, wanted) in _RULES.items():
        is_given = key in settings and (settings[key] not in (None, unset) or key in needed)
        if is_given and not is_right(settings[key]):
            raise ValueError(f"{label}: `{key}` in its settings must be {wanted}, got {shown(settings[key])}.")


def adapter_config(settings: Any, label: str) -> Any:
    """
    The `peft.PeftConfig` of settings from a file.

    Raises:
        ValueError: if they are none.
    """
    from peft import LoraConfig

    check_settings(settings, label)
    try:
        return LoraConfig.from_peft_type(**settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{label}: its settings make no adapter ({error!r}).") from error


def read_config(path: str | os.PathLike, hub: dict[str, Any]) -> Any:
    """
    The `peft.PeftConfig` of an adapter in peft's format, in a folder or on the Hub (see [`hub_arguments`]).

    Raises:
        OSError: if there is none.
        ValueError: see [`adapter_config`].
    """
    if (file := find_file(path, SETTINGS_FILE, **hub)) is None:
        raise OSError(f"`peft_model_id` '{path}' has no {SETTINGS_FILE}: it is no adapter.")
    return adapter_config(read_json(file), f"The adapter '{path}'")


def read_weights(
    path: str | os.PathLike, use_safetensors: bool | None, hub: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """
    The tensors beside the settings of an adapter, by the names of the file; `use_safetensors` as in `from_pretrained`.

    Raises:
        OSError: if the file is missing or truncated.
    """
    names = {None: WEIGHT_FILES, True: WEIGHT_FILES[:1], False: WEIGHT_FILES[::-1]}[use_safetensors]
    file = next((file for name in names if (file := find_file(path, name, **hub)) is not None), None)
    if file is None:
        raise OSError(f"`peft_model_id` '{path}' has no {' and no '.join(names)}: the adapter's weights are missing.")
    try:
        return load_file(file) if file.endswith(".safetensors") else torch.load(file, "cpu", weights_only=True)
    except SafetensorError as error:
        raise OSError(f"The file '{file}' is truncated or is no safetensors file ({error}).") from error


def fitting_adapter(
    model: Any,
    config: Any,
    weights: dict[str, torch.Tensor],
    label: str,
    allow_missing_layers: bool = False,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """
    An adapter that fits a model, as the model may take it: with the names of its modules, and settings without a pattern
    that the libraries might not come to an end with.

    Args:
        model (`PreTrainedModel`): On any device; it is left as it is.
        config (`peft.PeftConfig`): It is left as it is, too.
        weights (`dict[str, torch.Tensor]`): By the names of a file. Those of halves that the model lacks are left out.
        label (`str`): What the adapter is called in errors.
        allow_missing_layers (`bool`, *optional*, defaults to `False`):
            Whether it may lack layers that its settings name. They stay as they are in the model.

    Raises:
        ValueError: if it lacks a tensor, or holds one that is unknown, misshapen, of integers, or not finite; and if
            its settings are out of bounds.
    """
    check_settings(vars(config), label)
    layers = _layers(model)
    own = {_own_name(name, layers): tensor for name, tensor in weights.items()}
    if len(own) < len(weights):
        raise ValueError(f"{label} holds a tensor twice, by its original name and by that of this package.")
    ignored = "|".join(model._keys_to_ignore_on_load_unexpected or []) or r"(?!)"
    own = {name: own[name] for name in own if _layer_of(name, layers) or not re.search(ignored, name)}
    given = {layer for name in own if (layer := _layer_of(name, layers))}
    if not given:
        raise ValueError(
            f"{label} must hold weights of the transformer's layers, the linear ones, named like "
            "`model.language_model.layers.0.self_attn.q_proj_moe_gen.lora_A.weight`, but it holds "
            f"{some(sorted(weights)) or 'nothing'}."
        )
    config, named = _resolved(config, layers, given, label)
    missing = named - given
    problems = []
    if missing and not allow_missing_layers:
        problems.append(
            f"its settings name {len(named)} layers, of which {some(sorted(missing))} are missing (pass "
            "`allow_missing_layers=True` to leave these as they are)"
        )
    if missing:
        config.target_modules = given & named
    if not other_tensors(config):
        # In the model's order, so that the first of many faults is the same in each run.
        adapted = {name: layer for name, layer in layers.items() if name in given & named}
        problems += _wrong_pairs(config, own, adapted)
    problems += _wrong_numbers(own)
    if problems:
        raise ValueError(f"{label} does not fit the transformer or its own settings: {'; '.join(problems)}.")
    return config, own


def _own_name(name: str, layers: dict[str, nn.Module]) -> str:
    name = module_name(name.removeprefix(PEFT_PREFIX))
    # Older releases of peft saved magnitudes as the parameter that they are.
    name = name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name
    return next((root for root in (name, *_in_other_roots(name)) if _layer_of(root, layers)), name)


def _in_other_roots(name: str) -> tuple[str, str]:
    """As the model with a head and the one without it call each other's modules."""
    return f"model.{name}", name.removeprefix("model.")


def _original_name(name: str) -> str:
    for pattern, replacement in WEIGHT_RENAMINGS:
        if name.startswith(replacement):
            return re.sub(r"[\\^]", "", pattern) + name.removeprefix(replacement)
    return name


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """What an adapter may change, by name, as it is below other adapters."""
    inside = tuple(f"{name}." for name in adapted_layers(model))
    found = {}
    for name, module in model.named_modules():
        layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if not name.startswith(inside) and (hasattr(layer, "in_features") or isinstance(layer, nn.Embedding)):
            found[name] = layer
    return found


def _layer_of(name: str, layers: dict[str, nn.Module]) -> str | None:
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name or None


def _resolved(config: Any, layers: dict[str, nn.Module], given: set[str], label: str) -> tuple[Any, set[str]]:
    """A copy of settings without foreign patterns, and the layers that it names."""
    from peft.tuners.tuners_utils import check_target_module_exists

    config = copy.copy(config)
    known = {alias: name for name in layers for alias in (_original_name(name), *_in_other_roots(name))}
    known |= {name: name for name in layers}
    names = Names(known)
    for key in _PATTERNS:
        value = getattr(config, key, None)
        if value is None or value in LORA_TARGETS.values() or _are_all_linear(value):
            continue
        with _named_in_errors(label, key):
            found = names.whole(value) if isinstance(value, str) else value
        setattr(config, key, {known.get(name, name) for name in found})
    if config.target_modules is None or _are_all_linear(config.target_modules):
        # The libraries know which these are; what is missing is missed when they are loaded.
        named = given
    else:
        named = {name for name in layers if check_target_module_exists(config, name)}
    adapted = {alias: name for alias, name in known.items() if name in given}
    names = Names(adapted)
    for key in _STRENGTHS:
        patterns = getattr(config, key, None) or {}
        if not _are_few_names(patterns, layers):
            with _named_in_errors(label, key):
                # The first pattern counts.
                items = reversed(patterns.items())
                strengths = {adapted[name]: value for pattern, value in items for name in names.ends(pattern)}
            setattr(config, key, {f"^{re.escape(name)}": strengths[name] for name in sorted(strengths)})
    return config, named


def _are_few_names(patterns: Iterable[str], layers: Iterable[str]) -> bool:
    others = set(patterns) - {f"^{re.escape(name)}" for name in layers}
    return len(others) <= FEW_NAMES and all(re.fullmatch(r"\w+", name) for name in others)


def _are_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


@contextmanager
def _named_in_errors(label: str, key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{label}: `{key}` in its settings cannot be used: {error}. Name the layers in a list."
        ) from error


def other_tensors(config: Any) -> list[str]:
    """Settings by which an adapter has something else than two matrices for each layer, with magnitudes and biases of their
    own beside them."""
    if config.peft_type != "LORA":
        return ["peft_type"]
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    found = [name for name in (*variants, *_OTHER_TENSORS) if name != "use_dora" and getattr(config, name)]
    return found if config.bias == "none" else [*found, "bias"]


def _pair(config: Any, name: str, layer: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a layer, by name."""
    rank, _ = configured_strength(config, name)
    if isinstance(layer, nn.Embedding):
        width = layer.embedding_dim
        shapes: dict[str, tuple[int, ...]] = {
            "lora_embedding_A": (rank, layer.num_embeddings),
            "lora_embedding_B": (width, rank),
        }
    else:
        width = layer.out_features
        shapes = {"lora_A.weight": (rank, layer.in_features), "lora_B.weight": (width, rank)}
    if config.use_dora:
        shapes["lora_magnitude_vector"] = (width,)
    if config.lora_bias:
        shapes["lora_B.bias"] = (width,)
    return {f"{name}.{part}": shape for part, shape in shapes.items()}


def _wrong_pairs(config: Any, weights: dict[str, torch.Tensor], layers: dict[str, nn.Module]) -> list[str]:
    expected = {key: shape for name, layer in layers.items() for key, shape in _pair(config, name, layer).items()}
    problems = []
    if missing := expected.keys() - weights.keys():
        problems.append(f"it lacks {some(sorted(missing))}")
    # peft saves a table beside what it adds to it.
    tables = {f"{name}.base_layer.weight" for name, layer in layers.items() if isinstance(layer, nn.Embedding)}
    if stray := weights.keys() - expected.keys() - tables:
        problems.append(
            f"it holds {some(sorted(stray))}, which its settings do not name or the transformer does not have"
        )
    misshapen = [
        f"{name} is {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    return problems + misshapen[:3]


def _wrong_numbers(weights: dict[str, torch.Tensor]) -> list[str]:
    problems = []
    if integers := [name for name, tensor in weights.items() if not tensor.is_floating_point()]:
        problems.append(f"{some(sorted(integers))} must be of floating numbers")
    if broken := [name for name, tensor in weights.items() if tensor.is_floating_point() and not is_finite(tensor)]:
        problems.append(f"{some(sorted(broken))} holds NaN or infinity")
    return problems
