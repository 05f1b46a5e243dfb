"""Accelerators that are not there: tensors on "meta:0" and "meta:1" whose numbers lie on the CPU.

Every operator runs on the CPU, but as on a real machine only if its tensors lie on one device. So a forward gives its
numbers, names the first operator that mixes devices, and counts what the host reads back, each of which makes it wait.
Attention must be `eager`: the library's fused one asks the device for its kernels.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


# Operators that take tensors of two devices, as on a real machine: copies, and indices on the CPU.
MIXED = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}
READS = {"_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "unique_consecutive", "masked_select", "equal"}


class OnDevice(torch.Tensor):
    """A tensor that says it lies on a device; `inner` holds its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of `EmulatedDevices`")


def _inner(item: Any) -> Any:
    if isinstance(item, OnDevice):
        return item.inner
    # `torch.tensor([], device=...)`, with which the library begins its caches, does not come through here.
    is_empty = isinstance(item, torch.Tensor) and item.device.type == "meta" and not item.numel()
    return torch.empty(item.shape, dtype=item.dtype) if is_empty else item


class EmulatedDevices(TorchDispatchMode):
    """
    Runs operators of [`OnDevice`] tensors.

    Attributes:
        reads (`Counter`): Operators by which the host read numbers of a device.
        dtypes (`set[torch.dtype]`): Of what lay on a device; MPS has no float64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, torch.Tensor)]
        on_device = [item for item in tensors if isinstance(item, OnDevice)]
        device = on_device[0].device if on_device else None
        if name not in MIXED:
            for item in tensors:
                is_scalar = item.ndim == 0 and item.device.type == "cpu"
                if device is not None and item.device != device and not is_scalar and item.numel():
                    found = ", ".join(f"{tuple(item.shape)} on {item.device}" for item in tensors)
                    raise RuntimeError(f"Expected all tensors of {name} on one device, found {found}")
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted)
        if on_device and (name in READS or (name in ("_to_copy", "copy_") and self._is_read(name, args, wanted))):
            self.reads[name] += 1
        if wanted is not None:
            device = wanted if wanted.type == "meta" else None
            kwargs["device"] = torch.device("cpu")
        originals = {id(item.inner): item for item in on_device}
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        if name in ("index_put_", "copy_", "_index_put_impl_"):
            device = args[0].device if isinstance(args[0], OnDevice) else None
        outputs = func(*inner_args, **inner_kwargs)

        def wrap(item: Any) -> Any:
            if not isinstance(item, torch.Tensor) or device is None or device.type != "meta":
                return item
            self.dtypes.add(item.dtype)
            return originals.get(id(item)) if id(item) in originals and wanted is None else OnDevice(item, device)

        return tree_map(wrap, outputs)

    @staticmethod
    def _is_read(name: str, args: tuple, wanted: torch.device | None) -> bool:
        if name == "copy_":
            return not isinstance(args[0], OnDevice) and isinstance(args[1], OnDevice)
        return isinstance(args[0], OnDevice) and wanted is not None and wanted.type == "cpu"


def place(model: nn.Module, device_of: Any) -> nn.Module:
    """Put each weight and buffer of a model where `device_of(name of its module)` says."""
    with EmulatedDevices():
        for name, module in model.named_modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        moved: torch.Tensor = OnDevice(tensor.data, torch.device(device_of(name)))
                        is_parameter = tensors is module._parameters
                        tensors[key] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    return model


def on(device: str, tensor: torch.Tensor) -> torch.Tensor:
    return OnDevice(tensor, torch.device(device))


def numbers(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor holds, on the CPU."""
    return tensor.inner if isinstance(tensor, OnDevice) else tensor
