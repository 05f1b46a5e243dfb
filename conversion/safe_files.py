# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Files of checkpoints that may come from anybody: a header is checked before a tensor is read, and no path leaves its
folder.
"""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


# Names of the safetensors format.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# The format's own limit, in bytes.
MAX_HEADER = 100_000_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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


def stored_tensors(file: Path) -> list[StoredTensor]:
    """
    The tensors of a safetensors file in the order of their bytes, none of them read.

    Raises:
        ValueError: if the file is no whole safetensors file, or if its header does not fit its bytes.
    """
    if file.suffix in PICKLES:
        raise ValueError(
            f"'{file}' is a pickle, which may run any code when it is read. Only safetensors are read, unless "
            "--allow-pickle of convert_bagel_to_hf.py names the file."
        )
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"'{file}' is truncated or is no safetensors file: a header of {length} bytes in {size}.")
        try:
            header = json.loads(stream.read(length))
            tensors = []
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = (8 + length + _whole(offset) for offset in entry["data_offsets"])
                    shape = tuple(_whole(side) for side in entry["shape"])
                    tensors.append(StoredTensor(name, DTYPES[entry["dtype"]], shape, file, start, end))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The header of '{file}' cannot be read ({error!r}).") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = 8 + length
    for tensor in tensors:
        num_bytes = tensor.num_elements * tensor.dtype.itemsize
        if tensor.start != end or tensor.end != end + num_bytes:
            raise ValueError(
                f"'{file}' is broken: '{tensor.name}' of shape {tensor.shape} and {tensor.dtype} takes bytes {end} to "
                f"{end + num_bytes}, and its header says {tensor.start} to {tensor.end}."
            )
        end = tensor.end
    if end != size:
        raise ValueError(f"'{file}' is truncated, or longer than its header says: {size} bytes instead of {end}.")
    return tensors


def pickled_tensors(file: Path) -> list[StoredTensor]:
    """
    The tensors of a file of `torch.save` in the order of their bytes, none of them read. Only tensors are unpickled.

    Raises:
        ValueError: if it holds anything but one dictionary of whole tensors, or is in torch's format from before 1.6.
    """
    try:
        # Without data, and with the place where they lie in the file.
        with FakeTensorMode():
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"'{file}' cannot be read as tensors alone ({str(error).splitlines()[0]}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' must hold one dictionary of tensors, and it holds a {type(content).__name__}.")
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"'{file}' must hold tensors alone, and it holds {', '.join(others[:3])}.")
    tensors = []
    for name, value in content.items():
        offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if offset is None or not value.is_contiguous():
            raise ValueError(f"'{name}' does not lie in '{file}' as one piece. Save it again, as safetensors.")
        start = offset + value.storage_offset() * value.dtype.itemsize
        end = start + value.numel() * value.dtype.itemsize
        tensors.append(StoredTensor(name, value.dtype, tuple(value.shape), file, start, end))
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.end))


def _whole(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{number!r} is no size")
    return number
