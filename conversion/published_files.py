# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The published layout: which of its files are there, in a folder, in a repository, or beside a bare file of weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from safe_files import PICKLES, StoredTensor, file_inside, pickled_tensors, stored_tensors


# Published weights: the average that the publisher gives out, and the weights of the last step beside it in trainings.
WHICH = {"ema": "ema.safetensors", "model": "model.safetensors"}
INDEX = "model.safetensors.index.json"
VAE = "ae.safetensors"
# Small files: settings and tokenizer.
DESCRIPTIONS = (
    "config.json",
    "llm_config.json",
    "vit_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
CARD = "README.md"
# What is wanted of a repository of the Hub.
PATTERNS = ("*.safetensors", *DESCRIPTIONS, INDEX, CARD)


@dataclass(frozen=True)
class PublishedFiles:
    """A checkpoint in the published layout.

    Attributes:
        name (`str`): Hub id or folder, as the user gave it.
        descriptions (`dict[str, Path]`): Settings and tokenizer, by name.
        weights (`tuple[Path, ...]`): Files of the model.
        vae (`Path`)
        card (`Path`, *optional*): Of the weights' own folder.
        pickled (`bool`): Whether the files of the model are pickles.
    """

    name: str
    descriptions: dict[str, Path]
    weights: tuple[Path, ...]
    vae: Path
    card: Path | None = None
    pickled: bool = False

    def tensors(self) -> list[StoredTensor]:
        """The model's, in the order of their bytes.

        Raises:
            ValueError: if a file is broken, or two hold one tensor.
        """
        return list(tensors_of(self.weights, self.pickled).values())


def tensors_of(files: tuple[Path, ...], pickled: bool = False) -> dict[str, StoredTensor]:
    """The tensors of several files by name, in the order of their bytes.

    Args:
        files (`tuple[Path, ...]`)
        pickled (`bool`, *optional*, defaults to `False`): Whether they are pickles, which the user must have allowed.

    Raises:
        ValueError: if a file is broken, or two hold one tensor.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in pickled_tensors(file) if pickled else stored_tensors(file):
            if tensor.name in found:
                raise ValueError(f"'{tensor.name}' is in '{found[tensor.name].file}' and in '{file}'.")
            found[tensor.name] = tensor
    return found


def find_published_files(
    source: str,
    base: str | None,
    which: str | None,
    revision: str | None,
    pickles: Sequence[str] = (),
) -> PublishedFiles:
    """
    The files of a checkpoint.

    Args:
        source (`str`): A folder, a file of weights, or a Hub id.
        base (`str`, *optional*): A folder or Hub id that has the settings, the tokenizer or the VAE if the source, a
            training's checkpoint, lacks them.
        which (`str`, *optional*): `"ema"` or `"model"`; by default what there is, the average before the others.
        revision (`str`, *optional*): Of the source on the Hub.
        pickles (`Sequence[str]`, *optional*): Files of the source that hold its weights and may be read although they
            are pickles.

    Raises:
        FileNotFoundError, ValueError: if something is missing or leads out of its folder.
    """
    folder, root, file = opened(source, revision, (*PATTERNS, *pickles))
    folders = [(folder, root)] + ([] if base is None else [opened(base, None)[:2]])
    descriptions = {}
    for name in DESCRIPTIONS:
        found = next(((place, inside) for place, inside in folders if (place / name).exists()), None)
        if found is not None:
            descriptions[name] = file_inside(found[1], name, found[0])
    if not {"config.json", "llm_config.json"} & descriptions.keys():
        raise FileNotFoundError(_incomplete(source, "config.json or llm_config.json", base))
    if not {"tokenizer.json", "vocab.json"} & descriptions.keys():
        raise FileNotFoundError(_incomplete(source, "tokenizer", base))
    with_vae = next(((place, inside) for place, inside in folders if (place / VAE).exists()), None)
    if with_vae is None:
        raise FileNotFoundError(_incomplete(source, VAE, base))
    vae = file_inside(with_vae[1], VAE, with_vae[0])
    if pickles:
        weights = pickled_files(folder, root, file, pickles)
    else:
        weights = (file,) if file is not None else weight_files(folder, root, which)
    card = file_inside(root, CARD, folder) if (folder / CARD).exists() else None
    return PublishedFiles(source, descriptions, weights, vae, card, bool(pickles))


def opened(
    source: str, revision: str | None = None, patterns: tuple[str, ...] = PATTERNS
) -> tuple[Path, Path, Path | None]:
    """The folder of a source, what its files must lie in, and the file of weights if it is one.

    Args:
        source (`str`): A folder, a file of weights, or a Hub id.
        revision (`str`, *optional*): Of the source on the Hub.
        patterns (`tuple[str, ...]`, *optional*): Files of a repository of the Hub that are wanted.

    Raises:
        FileNotFoundError: if there is no such file or folder, and it cannot be the id of a repository.
    """
    path = Path(source)
    if path.is_file():
        return path.parent, path.parent, file_inside(path.parent, path.name)
    if path.is_dir():
        return path, path, None
    if path.is_absolute() or source.count("/") != 1:
        raise FileNotFoundError(f"'{source}' is no file, no folder, and no id of a repository on the Hub.")
    snapshot = Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    # A snapshot holds links into the folder of its repository.
    return snapshot, snapshot.parent.parent, None


def weight_files(folder: Path, root: Path, which: str | None) -> tuple[Path, ...]:
    """The files of the wanted weights. An index is followed if it is about them."""
    if (folder / INDEX).exists():
        index = json.loads(file_inside(root, INDEX, folder).read_text(encoding="utf-8"))
        names = sorted(set(index.get("weight_map", {}).values()))
        if names and (which is None or not set(WHICH.values()) & set(names) or WHICH[which] in names):
            return tuple(file_inside(root, name, folder) for name in names)
    wanted = WHICH.values() if which is None else [WHICH[which]]
    found = [name for name in wanted if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(
            f"'{folder}' holds no {' or '.join(wanted)} and no {INDEX} of such weights. Only safetensors are read."
        )
    return (file_inside(root, found[0], folder),)


def pickled_files(folder: Path, root: Path, file: Path | None, names: Sequence[str]) -> tuple[Path, ...]:
    """The files that the user allowed by name; of a source that is a file itself, no other.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is no pickle by its name.
    """
    files = tuple(file_inside(root, name, folder) for name in names)
    for path in files:
        if path.suffix not in PICKLES:
            raise ValueError(f"--allow-pickle: '{path.name}' is no pickle, whose names end with {', '.join(PICKLES)}.")
        if file is not None and path.resolve() != file.resolve():
            raise ValueError(f"--allow-pickle: '{path.name}' is not the source, '{file.name}'.")
    return files


def _incomplete(source: str, what: str, base: str | None) -> str:
    places = f"Neither '{source}' nor '{base}' has" if base else f"'{source}' has no"
    return f"{places} {what}. Name a complete checkpoint with --base: a folder, or ByteDance-Seed/BAGEL-7B-MoT."
