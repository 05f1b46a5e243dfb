# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Safetensors files that may come from anybody: their headers, and tensors that are read when they are asked for. Nothing is
mapped into memory: a system may refuse to map a file larger than its memory.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from transformers_bagel.checkpoints import DTYPES


# The format's own limit, in bytes.
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name (`str`)
        dtype (`torch.dtype`)
        shape (`tuple[int, ...]`)
        file (`Path`)
        start, end (`int`): Bytes of the file.
        continuation (`StoredTensor`, *optional*): Rows that follow those of the file; `shape` counts them too.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    continuation: StoredTensor | None = None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def stored_tensors(file: str | os.PathLike) -> list[StoredTensor]:
    """
    The tensors of a safetensors file in the order of their bytes, none of them read.

    Raises:
        OSError: if the file is no whole safetensors file, or if its header does not fit its bytes.
    """
    file = Path(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise _broken(file, f"a header of {length} bytes in {size}")
        text = stream.read(length)
    try:
        header = json.loads(text)
        if not all(isinstance(value, str) for value in (header.pop("__metadata__", None) or {}).values()):
            raise ValueError("`__metadata__` must hold texts")
        tensors = [_entry(name, entry, file, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(file, f"its header cannot be read: {error!r}") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = 8 + length
    for tensor in tensors:
        num_bytes = tensor.num_elements * tensor.dtype.itemsize
        if tensor.start != end or tensor.end != end + num_bytes:
            raise _broken(
                file,
                f"'{tensor.name}' of shape {tensor.shape} and {tensor.dtype} takes bytes {end} to {end + num_bytes}, and "
                f"its header says {tensor.start} to {tensor.end}",
            )
        end = tensor.end
    if end != size:
        raise _broken(file, f"{size} bytes instead of {end}")
    return tensors


def _entry(name: str, entry: dict, file: Path, data: int) -> StoredTensor:
    start, end = (data + _whole(offset) for offset in entry["data_offsets"])
    return StoredTensor(name, DTYPES[entry["dtype"]], tuple(_whole(side) for side in entry["shape"]), file, start, end)


def _whole(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{number!r} is no size")
    return number


def _broken(file: Path, why: str) -> OSError:
    return OSError(f"The checkpoint file '{file}' is truncated or is no safetensors file ({why}). Download it again.")
