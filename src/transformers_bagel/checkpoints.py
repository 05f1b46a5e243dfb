# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What the files of a checkpoint must hold: JSON, tensors and their values. Whoever loads or converts one asks here."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

from .errors import shown, some
from .segments import SPECIAL_TOKENS
from .stored_tensors import StoredTensor, stored_tensors


logger = logging.get_logger(__name__)

# Of a text of JSON.
_STRING = r'("(?:\\.|[^"\\])*")'

# Name in a file -> name in the module tree. Saving applies the inverse, so that one file serves every reader.
WEIGHT_RENAMINGS = [
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vit_model\.vision_model\.", "model.vision_tower."),
    (r"^time_embedder\.mlp\.0\.", "model.time_embedder.linear_1."),
    (r"^time_embedder\.mlp\.2\.", "model.time_embedder.linear_2."),
    (r"^(connector|vae2llm|llm2vae|latent_pos_embed|vit_pos_embed)\.", r"model.\1."),
]

# Of a large tensor, how many rows are looked at, and how many bytes of one that is read whole are in memory at a time.
_SAMPLED_ROWS = 4
_BYTES_AT_ONCE = 2**24


def check_folder(path: str | os.PathLike, *parts: str) -> None:
    """
    Refuse a local folder in which something that is to be read is no file: a pipe would be waited for, for ever.

    Args:
        path (`str` or `os.PathLike`): A folder; a Hub id is left alone.
        parts (`str`): Folders in it that are read as well, if they are there.

    Raises:
        OSError: naming what is neither a file nor a folder.
    """
    for folder in {os.path.join(str(path), part) for part in ("", *parts)}:
        if not os.path.isdir(folder):
            continue
        for entry in os.scandir(folder):
            if os.path.exists(entry.path) and not (entry.is_file() or entry.is_dir()):
                raise OSError(f"'{entry.path}' is a pipe or a device, and no file. Remove it.")


def read_json(file: str | os.PathLike) -> dict[str, Any]:
    """
    Read a JSON file that holds an object of finite numbers. Comments, commas at an end and a byte order mark, of which JSON
    has none, are left out, with a warning.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming the file, if it holds anything else.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
        content = _parsed(text, file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{file}' cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' must hold a JSON object, and it holds a {type(content).__name__}.")
    return content


def _parsed(text: str, file: str | os.PathLike) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError:
        plain = re.sub(
            _STRING + r"|(?://|#)[^\n]*|/\*.*?\*/", _string_or_nothing, text.lstrip("\ufeff"), flags=re.DOTALL
        )
        plain = re.sub(_STRING + r"|,(?=\s*[}\]])", _string_or_nothing, plain)
        if plain == text:
            raise
        content = json.loads(plain, parse_constant=_refuse_constant)
    logger.warning_once(
        f"'{file}' is no JSON: it was read without comments, commas at an end, or a byte order mark. Correct it."
    )
    return content


def _string_or_nothing(match: re.Match) -> str:
    return match[1] or ""


@contextmanager
def strict_json(file: str | os.PathLike) -> Iterator[str | os.PathLike]:
    """A JSON file as other libraries can read it: itself, or, if only [`read_json`] can, a copy for the time being."""
    content = read_json(file)
    try:
        with open(file, encoding="utf-8") as text:
            json.load(text)
    except ValueError:
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, os.path.basename(file))
            with open(copy, "w", encoding="utf-8") as stream:
                json.dump(content, stream)
            yield copy
        return
    yield file


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def json_value(content: Mapping[str, Any], key: str, kind: type, file: str | os.PathLike) -> Any:
    """
    A value of a JSON file; an empty one if the key is missing or null.

    Raises:
        ValueError: naming the file and the key, if it is of another type.
    """
    value = content.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ValueError(f"`{key}` in '{file}' must be a {kind.__name__}, got {shown(value)}.")
    return value


def shard_names(index: str | os.PathLike) -> list[str]:
    """
    The files that an index of weights names.

    Raises:
        ValueError: if it is no index, or if a file lies outside of its folder.
    """
    names = json_value(read_json(index), "weight_map", dict, index).values()
    wrong = [name for name in names if not isinstance(name, str) or os.path.isabs(name) or ".." in name.split("/")]
    if wrong or not names:
        raise ValueError(
            f"`weight_map` in '{index}' must name the file of each tensor, in its folder, got "
            f"{shown(next(iter(wrong), {}))}{', which leads out of it' if wrong else ''}."
        )
    return sorted(set(names))


def open_tensors(files: Iterable[str | os.PathLike]) -> dict[str, StoredTensor]:
    """
    The tensors of safetensors files, by name. Nothing is read but the headers.

    Raises:
        OSError: if a file is no whole safetensors file.
        ValueError: if two files hold one tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        found = {tensor.name: tensor for tensor in stored_tensors(file)}
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"'{twice[0]}' is in '{tensors[twice[0]].file}' and in '{file}'. Remove one of them.")
        tensors |= found
    return tensors


def module_name(name: str) -> str:
    """A weight's name in the module tree, from its name in a file; others stay as they are."""
    for pattern, replacement in WEIGHT_RENAMINGS:
        name = re.sub(pattern, replacement, name)
    return name


def count_matches(names: Any, pattern: str) -> int:
    """How many different values the group of a pattern has at the beginning of names."""
    return len({match.group(1) for name in names if (match := re.match(pattern, name))})


def check_token_ids(config: Any, name: str | os.PathLike) -> None:
    """
    Refuse ids of special tokens that the vocabulary of the checkpoint `name` lacks, or of which one stands for two tokens.

    Raises:
        ValueError: naming the key of `config.json`.
    """
    text_config = config.get_text_config()
    markers = marker_ids(config)
    stated = markers | {f"text_config.{key}": getattr(text_config, key, None) for key in SPECIAL_TOKENS}
    for key, value in stated.items():
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and not 0 <= token_id < text_config.vocab_size:
                raise ValueError(
                    f"`{key}` in the config.json of '{name}' is {token_id}, and the vocabulary ends at "
                    f"{text_config.vocab_size - 1}. Take the id from the tokenizer."
                )
    for key, token_id in markers.items():
        if twins := [other for other in markers if other != key and markers[other] == token_id]:
            raise ValueError(
                f"`{key}` and `{twins[0]}` in the config.json of '{name}' are both {token_id}. Take the ids from the "
                "tokenizer."
            )


def marker_ids(config: Any) -> dict[str, int]:
    """Ids of the tokens around and in the place of images, by key of `config.json`."""
    text_config = config.get_text_config()
    return {
        key: getattr(config, key) for key in SPECIAL_TOKENS if hasattr(config, key) and not hasattr(text_config, key)
    }


def check_layers(config: Any, names: Any, name: str | os.PathLike, settings: str = "its configuration") -> None:
    """
    Refuse a configuration with more layers than the checkpoint `name` has, before a model is made of it.

    Args:
        config ([`BagelConfig`])
        names (`Iterable[str]`): Of the tensors in the files.
        name, settings (`str`): What the error calls the checkpoint, and its configuration.

    Raises:
        ValueError: naming the key of `config.json`, and both numbers.
    """
    names = [module_name(key) for key in names]
    vision, text = r"(?:.*\.)?encoder\.layers\.(\d+)\.", r"(?:(?!.*encoder\.).*\.)?layers\.(\d+)\."
    parts = {"": (config, vision if config.base_config_key == "vision_config" else text)}
    if hasattr(config, "text_config"):
        parts = {"text_config.": (config.text_config, text)}
        if config.visual_und:
            parts["vision_config."] = (config.vision_config, vision)
    for prefix, (part, pattern) in parts.items():
        found = count_matches(names, pattern)
        if part.num_hidden_layers > found:
            raise ValueError(
                f"The checkpoint '{name}' does not fit {settings}: it lacks layers, `{prefix}num_hidden_layers` in "
                f"config.json is {part.num_hidden_layers}, and its files have {found}."
            )


def check_shapes(
    model: Any,
    shapes: Mapping[str, tuple[int, ...]],
    name: str | os.PathLike,
    ignore_mismatched_sizes: bool = False,
    ignore_unexpected_keys: bool = False,
    settings: str = "its configuration",
) -> None:
    """
    Compare names and shapes of the tensors of the checkpoint `name` with a model on any device.

    Raises:
        ValueError: if a tensor is missing, unexpected or misshapen.
    """
    expected, stored = _expected_shapes(model), _stored_names(shapes)
    ignored = any_of(model._keys_to_ignore_on_load_unexpected)
    optional = any_of(model._keys_to_ignore_on_load_missing)
    if getattr(model.config, "tie_word_embeddings", False):
        optional += r"|^lm_head\.weight$"

    problems = []
    if missing := sorted(key for key in expected.keys() - stored.keys() if not re.search(optional, key)):
        problems.append(f"lacks {listed(missing)}")
    unknown = (stored[key] for key in sorted(stored.keys() - expected.keys()))
    unexpected = [] if ignore_unexpected_keys else [key for key in unknown if not re.search(ignored, key)]
    if unexpected:
        modules = some(dict.fromkeys(key.split(".")[0] for key in unexpected), 10)
        problems.append(
            f"has the unknown {listed(unexpected)}, in {modules} (`ignore_unexpected_keys=True` leaves them out)"
        )
    misshapen = [
        f"{key} {shapes[key]} instead of {expected[own_name]}"
        for own_name, key in stored.items()
        if own_name in expected and shapes[key] != expected[own_name]
    ]
    if misshapen and not ignore_mismatched_sizes:
        problems.append(f"has the wrong shape of {listed(misshapen)}")
    if problems:
        raise ValueError(
            f"The checkpoint '{name}' does not fit {settings}: it {'; it '.join(problems)}. Download it again, or correct "
            "`config.json`."
        )


def check_tensors(model: Any, headers: Mapping[str, Any], name: str | os.PathLike, *ignored_and_settings: Any) -> None:
    """
    Compare what is known of the tensors of the checkpoint `name` with a model on any device.

    Args:
        model ([`PreTrainedModel`])
        headers (`Mapping[str, Any]`): By name in the file; each has a `shape` and a `dtype`.
        name (`str`), ignored_and_settings: See [`check_shapes`].

    Raises:
        ValueError: if a tensor is missing, unexpected, misshapen, or of another kind of numbers.
    """
    check_shapes(model, {key: header.shape for key, header in headers.items()}, name, *ignored_and_settings)
    for key in own_names(model, headers):
        if not headers[key].dtype.is_floating_point:
            raise ValueError(
                f"The checkpoint '{name}' holds {headers[key].dtype} instead of floating numbers in {key}. Download it again."
            )


def own_names(model: Any, names: Any) -> list[str]:
    """Those of the names of a checkpoint's tensors that a model has a place for."""
    expected = _expected_shapes(model)
    return [name for own_name, name in _stored_names(names).items() if own_name in expected]


def check_values(tensors: Mapping[str, StoredTensor], name: str | os.PathLike) -> None:
    """
    Look for numbers that are not finite in the tensors of the checkpoint `name`: in all of the head, of the norms and of
    the biases, and in some rows of every other tensor.

    Args:
        tensors (`Mapping[str, StoredTensor]`): Of floating numbers, see [`open_tensors`].
        name (`str`): What the error calls the checkpoint.

    Raises:
        ValueError: naming the tensor.
    """
    for key, tensor in tensors.items():
        if not all(map(is_finite, _looked_at(key, tensor))):
            raise ValueError(
                f"The checkpoint '{name}' holds numbers that are not finite in {key}: its training went wrong, or the file "
                "is broken."
            )


def _looked_at(key: str, tensor: StoredTensor) -> Iterator[torch.Tensor]:
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    row = tensor.num_elements // max(rows, 1)
    # A factor of a weight in FP8 is as good as many numbers.
    is_whole = key.endswith("lm_head.weight") or "scale" in key.rpartition(".")[2]
    if rows <= _SAMPLED_ROWS or is_whole:
        count = min(rows, max(1, _BYTES_AT_ONCE // max(row * tensor.dtype.itemsize, 1)))
        places: Iterable[int] = range(0, rows, max(count, 1))
    else:
        places, count = (index * (rows - 1) // (_SAMPLED_ROWS - 1) for index in range(_SAMPLED_ROWS)), 1
    for place in places:
        yield tensor.read(place * row, min(place + count, rows) * row)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite, in a single pass without a copy."""
    if not tensor.numel():
        return True
    # Both are NaN if any number is.
    extremes = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return all(bool(extreme.isfinite()) for extreme in extremes)


def _expected_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix("model."): tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _stored_names(names: Any) -> dict[str, str]:
    return {module_name(key).removeprefix("model."): key for key in names}


def any_of(patterns: Any) -> str:
    """One pattern for several, or one that fits nothing."""
    return "|".join(patterns or []) or r"(?!)"


def listed(names: list[str]) -> str:
    return f"tensor{'s' * (len(names) > 1)} {some(names)}"
