# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Tensors from file to file, a piece at a time: memory does not grow with them, and what is written is written whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm.auto import tqdm

from transformers_bagel.checkpoints import is_finite
from transformers_bagel.destinations import destination
from transformers_bagel.stored_tensors import DTYPE_NAMES, StoredTensor, stored_tensors


# Bytes in memory at a time. A whole number of elements of any type.
PIECE = 2**25
# What transformers and diffusers ask of a file that they read.
FORMAT = {"format": "pt"}
UNFINISHED = ".unfinished"
# Space on the disk for the small files.
SPARE_BYTES = 2**26


@dataclass(frozen=True)
class ContinuedTensor(StoredTensor):
    """A tensor whose rows lie in two files.

    Attributes:
        continuation (`StoredTensor`): Rows that follow those of the file; `shape` counts them too.
    """

    continuation: StoredTensor


@dataclass(frozen=True)
class Shard:
    """
    A file to write.

    Attributes:
        name (`str`)
        tensors (`tuple[StoredTensor, ...]`): In their order in the file.
        dtype (`torch.dtype`, *optional*): Of floating tensors; by default each keeps its own.
        metadata (`dict[str, str]`, *optional*): Of the header.
    """

    name: str
    tensors: tuple[StoredTensor, ...]
    dtype: torch.dtype | None = None
    metadata: dict[str, str] | None = None

    def dtype_of(self, tensor: StoredTensor) -> torch.dtype:
        return self.dtype if self.dtype is not None and tensor.dtype.is_floating_point else tensor.dtype

    @property
    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.num_elements * self.dtype_of(tensor).itemsize for tensor in self.tensors)

    def header(self) -> bytes:
        """What a safetensors file begins with."""
        entries: dict[str, object] = {} if self.metadata is None else {"__metadata__": self.metadata}
        end = 0
        for tensor in self.tensors:
            start, end = end, end + tensor.num_elements * self.dtype_of(tensor).itemsize
            dtype = DTYPE_NAMES[self.dtype_of(tensor)]
            entries[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": (start, end)}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        # Padded so that the data are aligned, as the format asks for.
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan_shards(
    tensors: list[StoredTensor], dtype: torch.dtype | None, max_shard_size: int | str, pattern: str
) -> tuple[list[Shard], dict[str, Any] | None]:
    """Files of at most `max_shard_size`, and the index of them, if there is more than one.

    Args:
        tensors (`list[StoredTensor]`): In the order in which they are to be written.
        dtype (`torch.dtype`, *optional*): Of floating tensors; by default each keeps its own.
        max_shard_size (`int` or `str`): Such as `"5GB"`.
        pattern (`str`): Name of the files, with `{suffix}`.
    """
    whole = Shard("", tuple(tensors), dtype)
    split = split_state_dict_into_shards_factory(
        {tensor.name: tensor for tensor in tensors},
        get_storage_size=lambda tensor: tensor.num_elements * whole.dtype_of(tensor).itemsize,
        filename_pattern=pattern,
        max_shard_size=max_shard_size,
    )
    by_name = {tensor.name: tensor for tensor in tensors}
    shards = [
        Shard(file, tuple(by_name[name] for name in names), dtype, FORMAT)
        for file, names in split.filename_to_tensors.items()
    ]
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None
    return shards, index


def pieces(tensor: StoredTensor, dtype: torch.dtype) -> Iterator[bytes]:
    """The bytes of a tensor as `dtype`, at most [`PIECE`] read at a time. Nothing is mapped into memory.

    Raises:
        OSError: if the file has become shorter than its header said.
    """
    with open(tensor.file, "rb") as stream:
        stream.seek(tensor.start)
        for start in range(tensor.start, tensor.end, PIECE):
            piece = stream.read(min(PIECE, tensor.end - start))
            if len(piece) != min(PIECE, tensor.end - start):
                raise OSError(f"'{tensor.file}' ends in the middle of '{tensor.name}'.")
            if dtype != tensor.dtype:
                piece = tensor_bytes(torch.frombuffer(bytearray(piece), dtype=tensor.dtype).to(dtype))
            yield piece
    if isinstance(tensor, ContinuedTensor):
        yield from pieces(tensor.continuation, dtype)


def check_finite(tensors: Sequence[StoredTensor], progress: tqdm) -> None:
    """
    Read tensors whole, a piece at a time.

    Raises:
        ValueError: naming the first that holds a number that is not finite.
    """
    for tensor in tensors:
        for piece in pieces(tensor, tensor.dtype):
            progress.update(len(piece))
            if tensor.dtype.is_floating_point and not is_finite(
                torch.frombuffer(bytearray(piece), dtype=tensor.dtype)
            ):
                raise ValueError(
                    f"'{tensor.name}' in '{tensor.file}' holds numbers that are not finite: its training went wrong, or "
                    "the file is broken."
                )


def read_tensor(tensor: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    """A whole tensor as `dtype`, in memory."""
    content = bytearray(b"".join(pieces(tensor, dtype)))
    return torch.frombuffer(content, dtype=dtype).view(tensor.shape)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def write_shard(
    shard: Shard,
    folder: Path,
    progress: tqdm,
    compute: Callable[[StoredTensor], torch.Tensor | None] = lambda tensor: None,
) -> None:
    """
    Write a file, which bears its name only when all of it is on the disk; an error leaves nothing of it.

    Args:
        shard (`Shard`)
        folder (`Path`)
        progress (`tqdm`): Counts bytes.
        compute (`Callable`, *optional*): What to write in the place of a stored tensor, of its shape; for `None` that
            is copied.
    """
    path = folder / shard.name
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with open(unfinished, "wb") as stream:
            stream.write(shard.header())
            for tensor in shard.tensors:
                dtype, computed = shard.dtype_of(tensor), compute(tensor)
                for piece in pieces(tensor, dtype) if computed is None else [tensor_bytes(computed.to(dtype))]:
                    stream.write(piece)
                    progress.update(len(piece))
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)


def verify_shard(shard: Shard, folder: Path, progress: tqdm) -> None:
    """
    Read a file again, and what it was made of. It is removed if they differ.

    Raises:
        ValueError: naming the first tensor that differs.
    """
    path = folder / shard.name
    try:
        written = stored_tensors(path)
        if [tensor.name for tensor in written] != [tensor.name for tensor in shard.tensors]:
            raise ValueError(f"'{path}' holds other tensors than it should.")
        for copy, tensor in zip(written, shard.tensors, strict=True):
            dtype = shard.dtype_of(tensor)
            same = (copy.dtype, copy.shape) == (dtype, tensor.shape)
            # Both in the pieces of the source, which a change of type makes shorter.
            with open(copy.file, "rb") as stream:
                stream.seek(copy.start)
                for piece in pieces(tensor, dtype):
                    same = same and stream.read(len(piece)) == piece
                    progress.update(len(piece))
            if not same:
                raise ValueError(f"'{tensor.name}' in '{path}' is not what '{tensor.file}' holds.")
    except (OSError, ValueError) as error:
        path.unlink()
        raise ValueError(f"{error} '{path}' is removed: run the same command again to write it anew.") from error


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, whole or not at all."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with open(unfinished, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, path)


def free_folder(folder: Path) -> Path:
    """
    A folder that [`whole_folder`] can make, as [`destination`] finds it.

    Raises:
        OSError: if it is taken, or cannot be made.
    """
    folder = destination(folder, "DST")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"'{folder}' is not empty. Name a new folder.")
    if folder.exists() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)):
        raise PermissionError(f"'{folder}' cannot be put in its place when it is whole. Name a new folder in it.")
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A place to fill, which becomes `folder` when all is written. An error leaves nothing, and a kill no folder of that name.

    Raises:
        OSError: see [`free_folder`].
    """
    folder = free_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # No other run's, whose rest or whose work it might be.
    unfinished = folder.with_name(f"{folder.name}-{os.getpid()}{UNFINISHED}")
    unfinished.mkdir()
    try:
        yield unfinished
        if folder.exists():
            folder.rmdir()
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def check_disk_space(folder: Path, needed: int) -> None:
    """
    Refuse a disk without enough space.

    Args:
        folder (`Path`): To be written, perhaps not there yet.
        needed (`int`): Bytes.

    Raises:
        OSError: if its disk has less.
    """
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(f"'{folder}' needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free.")
