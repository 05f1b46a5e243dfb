"""Counts what a forward reads back from a device, and what it mixes up, on a machine without one."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


TENSOR = torch.Tensor
DEVICE = torch.device("cuda", 0)
# What waits for a device, since its result lies on the host or has a shape that the values decide.
READS = {
    TENSOR.tolist,
    TENSOR.item,
    TENSOR.numpy,
    TENSOR.__array__,
    TENSOR.__bool__,
    TENSOR.__int__,
    TENSOR.__float__,
    TENSOR.__index__,
    TENSOR.__contains__,
    TENSOR.__repr__,
    TENSOR.nonzero,
    TENSOR.argwhere,
    TENSOR.unique,
    TENSOR.unique_consecutive,
    TENSOR.masked_select,
    TENSOR.bincount,
    TENSOR.equal,
    TENSOR.allclose,
    torch.nonzero,
    torch.argwhere,
    torch.unique,
    torch.unique_consecutive,
    torch.masked_select,
    torch.bincount,
    torch.equal,
    torch.allclose,
}


class HostReads(TorchFunctionMode):
    """
    Takes marked tensors, and all that is computed with them, for tensors of a device, and lists where they are read.

    Their `device` is a GPU's for the code under test, so that it treats them as it would there, though they lie on the
    CPU. What is inside a layout stays unmarked: the CPU's own.

    Attributes:
        found (`list[str]`): Function and place of each read.
        mixed (`list[str]`): Function and place of each call with tensors of both kinds, which a real device refuses.

    Example:

    ```python
    with HostReads() as reads:
        reads.put(model)
        model(**reads.put(batch)).loss.backward()
    assert reads.found == []
    ```
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.mixed: list[str] = []

    def put(self, values: Any) -> Any:
        """Mark a copy of each tensor of a mapping, or a module's own tensors."""
        if isinstance(values, nn.Module):
            for tensor in (*values.parameters(), *values.buffers()):
                tensor.on_device = True
            return values
        if isinstance(values, Mapping):
            return {name: self.put(value) for name, value in values.items()}
        if isinstance(values, torch.Tensor):
            values = values.clone()
            values.on_device = True
        return values

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        on_device = any(map(_is_marked, tensors))
        if func == TENSOR.device.__get__:
            return DEVICE if on_device else func(*args)
        asked = torch.device("cpu") if func == TENSOR.cpu else _device_of(func, args, kwargs)
        if on_device and (_reads(func, args, kwargs) or (asked is not None and asked.type == "cpu")):
            self.found.append(_described(func))
        # A device takes single numbers and indices of the CPU.
        others = [tensor for tensor in tensors if tensor.ndim and not _is_marked(tensor)]
        if on_device and others and asked is None and func not in (TENSOR.__getitem__, TENSOR.__setitem__):
            self.mixed.append(_described(func))
        args, kwargs = _with_cpu((args, kwargs))
        result = func(*args, **kwargs)
        if asked is not None:
            on_device = asked.type != "cpu"
        return _marked(result, on_device, (args, kwargs))


def _described(func: Any) -> str:
    place = next(
        frame
        for frame in reversed(traceback.extract_stack()[:-2])
        if "_bagel" in frame.filename or "test_" in frame.filename
    )
    return f"{getattr(func, '__name__', func)} at {place.filename}:{place.lineno}: {place.line}"


def _is_marked(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "on_device", False)


def _marked(result: Any, on_device: bool, given: Any) -> Any:
    """Mark what a call made, or not; what a copy to another device gave back as it was is copied."""
    if isinstance(result, torch.Tensor):
        if _is_marked(result) != on_device:
            if any(result is tensor for tensor in _tensors(given)):
                result = result.clone()
            result.on_device = on_device
    elif type(result) in (list, tuple):
        return type(result)(_marked(item, on_device, given) for item in result)
    elif isinstance(result, tuple):
        for item in result:
            _marked(item, on_device, ())
    return result


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _device_of(func: Any, args: tuple, kwargs: dict) -> torch.device | None:
    """The device that a call asks for."""
    asked = kwargs.get("device")
    if asked is None and func is TENSOR.to:
        other = args[1] if len(args) > 1 else kwargs.get("other")
        if isinstance(other, torch.Tensor):
            return DEVICE if _is_marked(other) else torch.device("cpu")
        asked = other if isinstance(other, (str, torch.device)) else None
    return None if asked is None else torch.device(asked)


def _with_cpu(values: Any) -> Any:
    if isinstance(values, torch.device):
        return torch.device("cpu")
    if isinstance(values, str) and values.startswith("cuda"):
        return "cpu"
    if type(values) is dict:
        return {name: _with_cpu(value) for name, value in values.items()}
    return type(values)(map(_with_cpu, values)) if type(values) in (list, tuple) else values


def _reads(func: Any, args: tuple, kwargs: dict) -> bool:
    if func in READS:
        return True
    if func in (TENSOR.repeat_interleave, torch.repeat_interleave):
        counts = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
        return isinstance(counts, torch.Tensor) and kwargs.get("output_size") is None
    if func is torch.where:
        return len(args) + len(kwargs) == 1
    if func in (TENSOR.__getitem__, TENSOR.__setitem__):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        has_mask = any(isinstance(item, torch.Tensor) and item.dtype in (torch.bool, torch.uint8) for item in index)
        # A number is written under a mask without asking how often.
        return has_mask and not (func is TENSOR.__setitem__ and not isinstance(args[2], torch.Tensor))
    if func in (TENSOR.split, torch.split, torch.tensor_split):
        return len(args) > 1 and isinstance(args[1], torch.Tensor)
    return False
