# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Where a checkpoint comes from: a folder, a file of weights, or a repository of the Hub, of which only what is asked for is
downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from safe_files import PICKLES, file_inside, pickled_tensors, read_json_object, root_of, safetensors_of

from transformers_bagel.stored_tensors import StoredTensor


INDEX = "model.safetensors.index.json"
CARD = "README.md"
# Endings of settings, tokenizers and cards.
SMALL_FILES = (".json", ".jinja", ".txt", ".md")


@dataclass(frozen=True)
class Source:
    """
    Where a checkpoint comes from.

    Attributes:
        name (`str`): Hub id, folder or file, as the user gave it.
        folder (`Path`): Of a repository, where what was downloaded lies.
        file (`Path`, *optional*): The file of weights, if it is one.
        revision (`str`, *optional*): Of a repository.
        is_repository (`bool`): Whether it is on the Hub.
    """

    name: str
    folder: Path
    file: Path | None = None
    revision: str | None = None
    is_repository: bool = False

    def find(self, name: str) -> Path | None:
        """A file by its name, or `None` if there is none.

        Raises:
            ValueError: if it leads out of the source.
        """
        if self.is_repository and not name.endswith(SMALL_FILES):
            snapshot_download(self.name, revision=self.revision, allow_patterns=[name])
        return self.path(name) if (self.folder / name).resolve().exists() else None

    def present(self, name: str) -> Path:
        """See [`Source.find`].

        Raises:
            FileNotFoundError: if there is no such file.
        """
        if (file := self.find(name)) is None:
            raise FileNotFoundError(f"There is no file '{name}' in '{self.name}'.")
        return file

    def path(self, name: str) -> Path:
        """See [`file_inside`]."""
        return file_inside(root_of(self.folder), name, self.folder)

    def fetch_all(self) -> None:
        """Download all of a repository but its pickles."""
        if self.is_repository:
            snapshot_download(self.name, revision=self.revision, ignore_patterns=[f"*{suffix}" for suffix in PICKLES])

    def indexed(self, folder: str = "") -> list[str]:
        """The files that the index of weights in a folder names, or none.

        Raises:
            ValueError: if it is no index.
        """
        if (file := self.find(folder + INDEX)) is None:
            return []
        names = read_json_object(file).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"'{file}' must have a `weight_map` of tensors and files.")
        return sorted(set(names.values()))


def opened(source: str, revision: str | None = None) -> Source:
    """
    A source with its small files.

    Args:
        source (`str`): A folder, a file of weights, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: if there is no such file or folder, and it cannot be the id of a repository.
    """
    path = Path(source)
    if path.is_file():
        return Source(source, path.parent, file_inside(root_of(path.parent), path.name, path.parent))
    if path.is_dir():
        return Source(source, path)
    if path.is_absolute() or source.count("/") != 1:
        raise FileNotFoundError(f"'{source}' is no file, no folder, and no id of a repository on the Hub.")
    folder = Path(
        snapshot_download(source, revision=revision, allow_patterns=[f"*{ending}" for ending in SMALL_FILES])
    )
    return Source(source, folder, revision=revision, is_repository=True)


def model_files(source: Source, folder: str = "") -> list[Path]:
    """The shards of a model in the layout of transformers, in order.

    Args:
        source (`Source`)
        folder (`str`, *optional*): In it, such as `"transformer/"`.

    Raises:
        FileNotFoundError: if there are none.
    """
    return [source.present(folder + name) for name in source.indexed(folder) or ["model.safetensors"]]


def in_parts_or_flat(folder: Path) -> tuple[str, str]:
    """Where a repository has its model and its processor: in folders of their own, as diffusers saves them, or at its root."""
    return ("transformer/", "processor/") if (folder / "transformer" / "config.json").exists() else ("", "")


def tensors_of(files: Sequence[Path], pickled: bool = False) -> dict[str, StoredTensor]:
    """The tensors of several files by name, in the order of their bytes.

    Args:
        files (`Sequence[Path]`)
        pickled (`bool`, *optional*, defaults to `False`): Whether they are pickles, which the user must have allowed.

    Raises:
        OSError, ValueError: if a file is broken, or two hold one tensor.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in pickled_tensors(file) if pickled else safetensors_of(file):
            if tensor.name in found:
                raise ValueError(f"'{tensor.name}' is in '{found[tensor.name].file}' and in '{file}'.")
            found[tensor.name] = tensor
    return found
