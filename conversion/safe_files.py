# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Files of checkpoints that may come from anybody: no path leaves its folder, and pickles are not run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from transformers_bagel.checkpoints import read_json
from transformers_bagel.stored_tensors import DTYPES, StoredTensor, stored_tensors


# What loading refuses, conversions refuse in the same words.
read_json_object = read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def root_of(folder: Path) -> Path:
    """What the files of a folder must lie in: itself, or, of a snapshot in the Hub's cache, the folder of its repository."""
    repository = folder.resolve().parent.parent
    is_snapshot = folder.resolve().parent.name == "snapshots" and (repository / "blobs").is_dir()
    return repository if is_snapshot else folder


def file_inside(root: Path, name: str, folder: Path | None = None) -> Path:
    """
    A file that a checkpoint names.

    Args:
        root (`Path`): What the file must lie in, links followed.
        name (`str`): Its name, as an index or a user wrote it.
        folder (`Path`, *optional*): What the name starts from; by default `root`.

    Raises:
        ValueError: if it lies elsewhere.
        FileNotFoundError: if it does not exist.
    """
    path = (folder or root) / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"'{name}' leads out of '{folder or root}' to '{path.resolve()}'. It is not read.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    return path


def check_links(folder: Path) -> None:
    """
    Refuse links that lead out of a folder.

    Raises:
        ValueError: if a file of a folder, or of a folder in it, lies elsewhere.
    """
    for file in folder.rglob("*"):
        if file.is_file():
            file_inside(root_of(folder), str(file.relative_to(folder)), folder)


def safetensors_of(file: Path) -> list[StoredTensor]:
    """[`stored_tensors`] of a file that is no pickle.

    Raises:
        ValueError: if it is one by its name.
        OSError: if it is no whole safetensors file.
    """
    if file.suffix in PICKLES:
        raise ValueError(
            f"'{file}' is a pickle, which may run any code when it is read. Only safetensors are read, unless "
            "--allow-pickle of convert_bagel_to_hf.py names the file."
        )
    return stored_tensors(file)


def pickled_tensors(file: Path) -> list[StoredTensor]:
    """
    The tensors of a file of `torch.save` in the order of their bytes, none of them read. Only tensors are unpickled.

    Raises:
        ValueError: if it holds anything but one dictionary of whole tensors, or is in torch's format from before 1.6.
    """
    records = zip_records(file)
    try:
        # Without data, and with the place where they lie in the file.
        with FakeTensorMode():
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"'{file}' cannot be read as tensors alone ({reason}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' must hold one dictionary of tensors, and it holds a {type(content).__name__}.")
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"'{file}' must hold tensors alone, and it holds {', '.join(others[:3])}.")
    tensors = [_pickled(str(name), value, file, records) for name, value in content.items()]
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.end))


def zip_records(file: Path) -> dict[int, int]:
    """Where the parts of a file of `torch.save` begin, and where each ends.

    Raises:
        ValueError: if it is no such file, if a part is compressed, or if its numbers have another order of bytes.
    """
    try:
        with zipfile.ZipFile(file) as archive, open(file, "rb") as stream:
            records = {}
            for part in archive.infolist():
                if part.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"'{file}' is compressed. Save it again, as safetensors.")
                if part.filename.endswith("/byteorder") and archive.read(part) != b"little":
                    raise ValueError(f"'{file}' comes from a machine with another order of bytes.")
                # The lengths of name and extra field in the part's own header, which may differ from the directory's.
                stream.seek(part.header_offset + 26)
                lengths = stream.read(4)
                name_and_extra = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                start = part.header_offset + 30 + name_and_extra
                records[start] = start + part.file_size
            return records
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"'{file}' is no whole file of `torch.save` ({error}), or one from before torch 1.6. Save it again, as "
            "safetensors."
        ) from error


def _pickled(name: str, tensor: torch.Tensor, file: Path, records: dict[int, int]) -> StoredTensor:
    whole = tensor.layout == torch.strided and tensor.dtype in DTYPES.values() and tensor.is_contiguous()
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if whole else None
    if offset is None:
        raise ValueError(f"'{name}' does not lie in '{file}' as one piece of numbers. Save it again, as safetensors.")
    start = offset + tensor.storage_offset() * tensor.dtype.itemsize
    end = start + tensor.numel() * tensor.dtype.itemsize
    if end > records.get(offset, 0):
        raise ValueError(f"'{file}' is broken: '{name}' takes bytes {start} to {end}, which are not its own.")
    return StoredTensor(name, tensor.dtype, tuple(tensor.shape), file, start, end)
