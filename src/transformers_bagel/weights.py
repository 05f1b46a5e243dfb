# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Which files of a repository hold the weights of its model: one rule for all who load or convert (`docs/loading.md`)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import huggingface_hub
from transformers.utils import logging

from .checkpoints import read_json, shard_names
from .errors import some
from .files import SETTINGS, file_names, find_cached, find_file, folder_and_file, in_subfolder, is_offline
from .packed import open_weights


logger = logging.get_logger(__name__)

LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
# Of VAEs and of adapters.
_OTHER_FILES = re.compile(r"(ae|adapter_model|pytorch_lora_weights|diffusion_pytorch_model)[.-]")
_INDEX = re.compile(r".+\.safetensors\.index\.json")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# Which of several files is read. A file with a name of its own is what its repository is about. In the original layout the
# average comes before the weights of the last step, and a `model.safetensors` that the library saved before both.
_ORDER = ("own", "ema", "model", "other", "gguf")
_ORDER_OF_THE_LIBRARY = ("model", "own", "ema", "other", "gguf")


class Weights(NamedTuple):
    """Files of weights: what they are called together (a file, an index, or the first of several), and all of them."""

    name: str
    files: tuple[str, ...]


def find_weights(
    path: str | os.PathLike,
    hub: dict[str, Any],
    named: str | None = None,
    variant: str | None = None,
    kind: str | None = None,
    stated: str | None = None,
    strict: bool = True,
) -> Weights | None:
    """
    The weights of the model in a directory or a repository of the Hub, nothing of them downloaded.

    Args:
        path (`str` or `os.PathLike`), hub (`dict`): See [`hub_arguments`].
        named (`str`, *optional*): The file or the index to take.
        variant (`str`, *optional*): As in `from_pretrained`: the `fp16` of `model.fp16.safetensors`.
        kind (`str`, *optional*): `"ema"` or `"model"`, if files of no other name will do.
        stated (`str`, *optional*): What a configuration says the file is; it is taken if it is there, and no variant is asked
            for.
        strict (`bool`, *optional*, defaults to `True`): Whether there must be such weights; otherwise `None` will do.

    Returns:
        [`Weights`], or `None` if there are none, or pickles only.

    Raises:
        OSError: if a file that is named, as an argument or by an index, is not there.
        ValueError: if it cannot be told which of several files is meant.
    """
    names = file_names(path, **hub)
    settings = _settings(path, names, hub)
    if "dfloat11_config" in settings:
        return _folder_of_df11(names)
    if named is None and variant is None and kind is None and settings.get("transformers_weights") in names:
        named = settings["transformers_weights"]
    if named is not None:
        return _named_weights(path, names, hub, named)
    found, stale = _candidates(path, names, hub, variant)
    kinds = {name: _kind(files[0], variant) for name, files in found.items()}
    kinds = {name: own for name, own in kinds.items() if kind in (None, own)}
    if len(kinds) > 1:
        kinds = {
            name: own
            for name, own in kinds.items()
            if own not in ("own", "other") or is_model(_shapes(path, found[name], hub))
        } or kinds
    order = _ORDER_OF_THE_LIBRARY if "text_config" in settings else _ORDER
    best = _first(kinds, found, order, variant)
    if stated in names and variant is None and best != [stated]:
        return _named_weights(path, names, hub, str(stated))
    if not strict:
        return Weights(best[0], found[best[0]]) if len(best) == 1 else None
    if len(best) > 1:
        raise ValueError(
            f"'{path}' holds several files of weights: {some(best, 10)}. Name one: "
            + ("`gguf_file=`." if best[0].endswith(".gguf") else "`transformers_weights=`.")
        )
    if not best and stale:
        index, missing = next(iter(stale.items()))
        raise _absent(path, index, missing, names)
    if not best:
        if variant is not None:
            raise OSError(f"'{path}' has no weights of the `variant` {variant!r}: {seen(names)}.")
        return None
    if others := [name for name in [*kinds, *stale] if name != best[0]]:
        logger.warning(
            f"'{path}' holds several files of weights: {best[0]} is read, and not {some(others)}"
            + "".join(f"; {name} names '{file}', which is not there" for name, file in stale.items())
            + ". Another is read if `transformers_weights=` names it."
        )
    return Weights(best[0], found[best[0]])


def _first(
    kinds: dict[str, str], found: dict[str, tuple[str, ...]], order: tuple[str, ...], variant: str | None
) -> list[str]:
    """Of several files of weights the one that is read, or those among which nothing chooses."""
    first = min((order.index(kind) for kind in kinds.values()), default=0)
    best = [name for name, kind in kinds.items() if order.index(kind) == first]
    if len({_stem(found[name][0], variant) for name in best}) == 1:
        # One name, uploaded whole and in shards: whole, as the library has it.
        best = sorted(best, key=lambda name: (len(found[name]) > 1, not name.endswith(".json")))[:1]
    return best


def seen(names: Iterable[str]) -> str:
    """For errors: the files that may be weights, and the rule by which they are looked for."""
    weights = [name for name in names if name.endswith((".safetensors", ".gguf", ".bin", ".pt", ".index.json"))]
    return (
        f"its files of weights are {some(weights, 10) or 'none'}; looked for are an index with its shards, ema.safetensors, "
        "model.safetensors, or another *.safetensors or *.gguf with BAGEL's tensors"
    )


def contents(path: str | os.PathLike, hub: dict[str, Any]) -> str:
    """For errors: what a directory or a repository is, if it is no checkpoint that can be loaded by itself, and the remedy."""
    names = file_names(path, **hub)
    if loras := [name for name in names if name in LORA_FILES]:
        return f"it is a LoRA ({loras[0]}): load its base, then `load_adapter` or `load_lora_weights`"
    models = _candidates(path, names, hub, None)[0]
    if models:
        return f"it holds weights alone ({some(models)}): pass `base=`, the folder or the Hub id of a whole checkpoint"
    if any(_OTHER_FILES.match(name) for name in names):
        return "it holds a VAE alone"
    return "pass the folder or the Hub id of one"


def has_pickles(path: str | os.PathLike, hub: dict[str, Any]) -> bool:
    return not {*_PICKLES}.isdisjoint(file_names(path, **hub))


def check_kind(config: Any, names: Iterable[str], path: str | os.PathLike) -> None:
    """
    Refuse tensors that are those of another model, or of a LoRA, by their names.

    Raises:
        ValueError: naming some of them.
    """
    names = list(names)
    if any(re.search(r"\.lora_[AB]\.|\.lora_(up|down)\.|lora_magnitude", name) for name in names):
        raise ValueError(
            f"'{path}' is a LoRA, with {some(names)}: load its base, then `load_adapter` or `load_lora_weights`."
        )
    if hasattr(config, "text_config") and not is_model(names):
        raise ValueError(
            f"The checkpoint '{path}' does not fit its configuration: it holds the weights of another model, {some(names)}, "
            "and none such as language_model.model.layers.0.self_attn.q_proj.weight."
        )


def check_no_model(path: str | os.PathLike, name: str | None, hub: dict[str, Any]) -> None:
    """
    Refuse a model where a LoRA is asked for, before it is read. What is no folder, and no file of safetensors or a GGUF, is
    left to the reader of LoRAs.

    Args:
        path (`str` or `os.PathLike`): A directory, a Hub id, or a file.
        name (`str`, *optional*): Of a file in it.
        hub (`dict`): See [`hub_arguments`].

    Raises:
        ValueError: if it is one.
    """
    path, own = folder_and_file(path)
    name = name or own
    if not os.path.isdir(path):
        return
    if name is None:
        names = {*file_names(path, **hub)}
        found = not names.isdisjoint((*SETTINGS, "model_index.json")) and names.isdisjoint(LORA_FILES)
    else:
        is_read = name.endswith((".safetensors", ".gguf")) and find_file(path, name, **hub) is not None
        found = is_read and is_model(_shapes(path, (name,), hub))
    if found:
        raise ValueError(
            f"'{path}' is a model, and no LoRA: pass it to `from_pretrained`, or name a file of LoRA weights."
        )


def is_model(names: Iterable[str]) -> bool:
    """Whether tensors are those of a BAGEL, by their names."""
    own = r"(model\.)?language_model\.(model\.)?layers\.\d+\..*_proj(_moe_gen)?\.(weight|bias|qweight|weight_\w+)"
    return any(re.fullmatch(own, name) for name in names)


def find_shapes(
    path: str | os.PathLike, hub: dict[str, Any], **choice: Any
) -> tuple[Weights | None, dict[str, tuple[int, ...]]]:
    """The weights of a repository, if it has any, with the shapes of their tensors; see [`find_weights`]."""
    weights = find_weights(path, hub, strict=False, **choice)
    return weights, {} if weights is None else _shapes(path, weights.files, hub)


def _settings(path: str | os.PathLike, names: list[str], hub: dict[str, Any]) -> dict[str, Any]:
    file = find_file(path, "config.json", **hub) if "config.json" in names else None
    return {} if file is None else read_json(file)


def _folder_of_df11(names: list[str]) -> Weights | None:
    """The library of DF11 reads all files of a folder, whatever they are called."""
    files = tuple(name for name in names if name.endswith(".safetensors") and not _OTHER_FILES.match(name))
    return Weights(files[0], files) if files else None


def _named_weights(path: str | os.PathLike, names: list[str], hub: dict[str, Any], named: str) -> Weights:
    if os.path.isabs(named) or ".." in named.split("/"):
        raise ValueError(f"`transformers_weights` must name a file in its folder, got {named!r}.")
    file = find_file(path, named, **hub) if named not in names or named.endswith(".json") else None
    if file is None and named not in names:
        raise OSError(f"'{path}' has no file '{named}': {seen(names)}.")
    if match := _SHARD.fullmatch(named):
        files = _shards(match)
    elif named.endswith(".json"):
        files = tuple(shard_names(file))  # type: ignore[arg-type]  # there is one, as was looked
    else:
        return Weights(named, (named,))
    if missing := [name for name in files if name not in names]:
        raise _absent(path, named, missing[0], names)
    return Weights(named, files)


def _absent(path: str | os.PathLike, index: str, missing: str, names: list[str]) -> OSError:
    return OSError(
        f"'{os.path.join(path, index)}' names the file '{missing}', which is not there. Download it again: there is no file "
        f"'{missing}' in '{path}'; {seen(names)}."
    )


def _candidates(
    path: str | os.PathLike, names: list[str], hub: dict[str, Any], variant: str | None
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Files of weights by the name that stands for them; and of indexes and sets that are not whole, a file that is missing."""
    names = [name for name in names if not _OTHER_FILES.match(name)]
    if variant is not None:
        names = [name for name in names if re.search(rf"\.{re.escape(variant)}[.-]", name)]
    files = [name for name in names if name.endswith(".safetensors")]
    sets = {name: _index_files(path, name, hub) for name in names if _is_index(name, variant)}
    indexed = {file for own in sets.values() for file in own}
    for name in files:
        if (match := _SHARD.fullmatch(name)) and name not in indexed:
            sets.setdefault(_shards(match)[0], _shards(match))
    found = {own[0] if len(own) == 1 else name: own for name, own in sets.items() if own and {*own} <= {*files}}
    stale = {
        name: next((file for file in own if file not in files), name)
        for name, own in sets.items()
        if not own or not {*own} <= {*files}
    }
    taken = {file for own in sets.values() for file in own}
    found |= {name: (name,) for name in files if name not in taken}
    return found | {name: (name,) for name in names if name.endswith(".gguf")}, stale


def _shards(match: re.Match) -> tuple[str, ...]:
    return tuple(f"{match[1]}-{number:05}-of-{match[2]}.safetensors" for number in range(1, int(match[2]) + 1))


def _is_index(name: str, variant: str | None) -> bool:
    return bool(_INDEX.fullmatch(name if variant is None else name.replace(f".{variant}", "")))


def _index_files(path: str | os.PathLike, name: str, hub: dict[str, Any]) -> tuple[str, ...]:
    """The files that an index names, less those of the VAE, which some indexes name, too."""
    file = find_file(path, name, **hub)
    return () if file is None else tuple(name for name in shard_names(file) if not _OTHER_FILES.match(name))


def _stem(file: str, variant: str | None) -> str:
    stem = match[1] if (match := _SHARD.fullmatch(file)) else os.path.splitext(file)[0]
    return stem if variant is None else stem.replace(f".{variant}", "")


def _kind(file: str, variant: str | None) -> str:
    stem = _stem(file, variant)
    if file.endswith(".gguf") or stem in ("ema", "model"):
        return "gguf" if file.endswith(".gguf") else stem
    return "other" if stem.lower().startswith(("ema", "model")) else "own"


def _shapes(path: str | os.PathLike, files: Iterable[str], hub: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: shape for file in files for name, shape in (_shapes_in(path, file, hub) or {}).items()}


def _shapes_in(path: str | os.PathLike, name: str, hub: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    # What is known of a GGUF is at no fixed place in it.
    is_whole = os.path.isdir(path) or name.endswith(".gguf")
    file = find_file(path, name, **hub) if is_whole else find_cached(path, name, hub)
    if isinstance(file, str):
        return {key: tensor.shape for key, tensor in open_weights([file]).items()}
    if os.path.isdir(path) or is_offline(hub):
        return None
    access = {"revision": hub.get("revision"), "token": hub.get("token")}
    metadata = huggingface_hub.parse_safetensors_file_metadata(str(path), in_subfolder(name, hub), **access)
    return {key: tuple(tensor.shape) for key, tensor in metadata.tensors.items()}
