# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Safetensors files that may come from anybody: their headers, and tensors that are read when they are asked for. Nothing is
mapped into memory, not even for a moment: a system may refuse to map a file larger than its memory, or than the address
space that a process may have.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


# Types by the names of safetensors.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The format's own limit, in bytes.
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. It is read as a slice of `safe_open` is: `tensor[...]` gives all of it.

    Attributes:
        name (`str`)
        dtype (`torch.dtype`)
        shape (`tuple[int, ...]`)
        file (`Path`)
        start, end (`int`): Bytes of the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES[self.dtype]

    def read(self, start: int, end: int) -> torch.Tensor:
        """
        The elements from `start` to `end` in the order of the file, `(end - start,)`.

        Raises:
            OSError: if the file has become shorter than its header said.
        """
        tensor = torch.empty(end - start, dtype=self.dtype)
        if tensor.numel():
            content = memoryview(tensor.view(torch.uint8).numpy())
            with open(self.file, "rb", buffering=0) as stream:
                stream.seek(self.start + start * self.dtype.itemsize)
                while content:
                    # A system reads two gigabytes at a time at most.
                    count = stream.readinto(content)
                    if not count:
                        raise OSError(f"'{self.file}' ends in the middle of '{self.name}'.")
                    content = content[count:]
        return tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        """What a tensor gives at this index. Of several rows no others are read."""
        first, *others = index if isinstance(index, tuple) else (index,)
        if not isinstance(first, slice) or not self.shape:
            return self.read(0, self.num_elements).view(self.shape)[index]
        start, end, step = first.indices(self.shape[0])
        row = math.prod(self.shape[1:])
        rows = self.read(start * row, max(start, end) * row).view(-1, *self.shape[1:])
        return rows[(slice(None, None, step), *others)]


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
