# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The original layout: which of its files are there, in a folder, in a repository, or beside a bare file of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safe_files import PICKLES
from sources import CARD, Source, tensors_of

from diffusers_bagel.loading import VAE_FILE, VAE_FILES
from transformers_bagel.files import file_names
from transformers_bagel.stored_tensors import StoredTensor
from transformers_bagel.weights import find_weights, seen


# Original weights: the average that the publisher gives out, and the weights of the last step beside it in trainings.
WHICH = {"ema": "ema.safetensors", "model": "model.safetensors"}
# Settings and tokenizer, each with the files of which it needs one. A template of chats is none of the layout's.
SETTINGS = ("config.json", "llm_config.json", "vit_config.json", "generation_config.json", "preprocessor_config.json")
NEEDED_SETTINGS = ("config.json", "llm_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
NEEDED_TOKENIZER = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class OriginalFiles:
    """A checkpoint in the original layout.

    Attributes:
        descriptions (`dict[str, Path]`): Settings and tokenizer, by name.
        weights (`tuple[Path, ...]`): Files of the model.
        vae (`Path`)
        card (`Path`, *optional*): Of the weights' own folder.
        pickled (`bool`): Whether the files of the model are pickles.
    """

    descriptions: dict[str, Path]
    weights: tuple[Path, ...]
    vae: Path
    card: Path | None
    pickled: bool

    def tensors(self) -> list[StoredTensor]:
        """The model's, in the order of their bytes."""
        return list(tensors_of(self.weights, self.pickled).values())


def find_original_files(
    source: Source, base: Source | None, which: str | None, pickles: Sequence[str] = ()
) -> OriginalFiles:
    """
    The files of a checkpoint.

    Args:
        source (`Source`)
        base (`Source`, *optional*): What has the settings, the tokenizer or the VAE if the source, a training's
            checkpoint, lacks them.
        which (`str`, *optional*): `"ema"` or `"model"`; by default what there is, the average before the others.
        pickles (`Sequence[str]`, *optional*): Files of the source that hold its weights and may be read although they
            are pickles.

    Raises:
        FileNotFoundError, ValueError: if something is missing, leads out of its folder, or contradicts the arguments.
    """
    places = [source] if base is None else [source, base]
    descriptions = one_group(places, SETTINGS, NEEDED_SETTINGS) | one_group(places, TOKENIZER, NEEDED_TOKENIZER)
    vae = next((file for place in places for name in VAE_FILES if (file := place.find(name)) is not None), None)
    if vae is None:
        raise FileNotFoundError(incomplete(places, VAE_FILE))
    weights = pickled_files(source, which, pickles) if pickles else weight_files(source, which)
    return OriginalFiles(descriptions, weights, vae, source.find(CARD), bool(pickles))


def one_group(places: Sequence[Source], names: Sequence[str], needed: Sequence[str]) -> dict[str, Path]:
    """The files of the first place that has one of those that are needed: parts of two places would not fit each other.

    Raises:
        FileNotFoundError: if none has.
    """
    for place in places:
        if any(place.find(name) is not None for name in needed):
            return {name: file for name in names if (file := place.find(name)) is not None}
    raise FileNotFoundError(incomplete(places, " or ".join(needed)))


def incomplete(places: Sequence[Source], what: str) -> str:
    return (
        f"There is no {what} in {' nor in '.join(repr(place.name) for place in places)}. Name a complete checkpoint with "
        "--base: a folder, or ByteDance-Seed/BAGEL-7B-MoT."
    )


def weight_files(source: Source, which: str | None) -> tuple[Path, ...]:
    """The files of the wanted weights.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if the source is a file of other ones.
    """
    if source.file is not None:
        if which is not None and source.file.name in set(WHICH.values()) - {WHICH[which]}:
            raise ValueError(f"--which {which}: '{source.file.name}' holds the other weights.")
        return (source.file,)
    place, hub = (source.name, {"revision": source.revision}) if source.is_repository else (source.folder, {})
    found = find_weights(place, hub, kind=which)
    if found is not None and not found.name.endswith(".gguf"):
        return tuple(source.present(name) for name in found.files)
    wanted = " or ".join(WHICH.values() if which is None else [WHICH[which]])
    raise FileNotFoundError(
        f"'{source.name}' holds no {wanted}, and no index of such weights. Only safetensors are read; "
        f"{seen(file_names(place, **hub))}."
    )


def pickled_files(source: Source, which: str | None, names: Sequence[str]) -> tuple[Path, ...]:
    """The files that the user allowed by name; of a source that is a file itself, no other.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is no pickle by its name.
    """
    if which is not None:
        raise ValueError("--which: the files of --allow-pickle are the weights. Leave it out.")
    files = tuple(source.present(name) for name in names)
    for path in files:
        if path.suffix not in PICKLES:
            raise ValueError(f"--allow-pickle: '{path.name}' is no pickle, whose names end with {', '.join(PICKLES)}.")
        if source.file is not None and path.resolve() != source.file.resolve():
            raise ValueError(f"--allow-pickle: '{path.name}' is not the source, '{source.file.name}'.")
    return files
