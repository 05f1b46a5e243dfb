# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The floor of a computation: its matrix products, convolutions and attentions, at the same shapes and in the same order,
and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional


Shape = tuple[int, ...]
# A random tensor of a shape, the same for equal shapes.
Values = Callable[[Shape], torch.Tensor]


@dataclass(frozen=True)
class Product:
    """A linear layer on `(rows, in_features)`, by what multiplied there."""

    rows: int
    layer: nn.Linear
    precision: str

    def bare(self, values: Values, backward: bool) -> Callable[[], object]:
        weight = self.layer.weight.detach()
        inputs, outputs = values((self.rows, weight.shape[1])), values((self.rows, weight.shape[0]))

        def run() -> None:
            found = torch.backends.mkldnn.matmul.fp32_precision
            torch.backends.mkldnn.matmul.fp32_precision = self.precision
            torch.mm(inputs, weight.T)
            torch.backends.mkldnn.matmul.fp32_precision = found
            if backward:
                torch.mm(outputs, weight)
                torch.mm(outputs.T, inputs)

        return run


@dataclass(frozen=True)
class Convolution:
    """A convolution on `(batch, channels, height, width)`."""

    shape: Shape
    layer: nn.Conv2d

    def bare(self, values: Values, backward: bool) -> Callable[[], object]:
        layer = self.layer
        weight = layer.weight.detach().requires_grad_(backward)
        inputs = values(self.shape).clone().requires_grad_(backward)

        def run() -> None:
            outputs = functional.conv2d(inputs, weight, None, layer.stride, layer.padding)
            if backward:
                outputs.backward(outputs.detach())

        return run


@dataclass(frozen=True)
class Attention:
    """Shapes of queries, keys and values, `(batch, heads, tokens, head_dim)`, and the other arguments."""

    shapes: tuple[Shape, ...]
    arguments: dict[str, Any]

    def bare(self, values: Values, backward: bool) -> Callable[[], object]:
        states = [values(shape).clone().requires_grad_() if backward else values(shape) for shape in self.shapes]
        gradient = values((*self.shapes[0][:-1], self.shapes[2][-1])) if backward else None

        def run() -> None:
            attended = functional.scaled_dot_product_attention(*states, **self.arguments)
            if backward:
                attended.backward(gradient)

        return run


@contextmanager
def recording(*modules: nn.Module) -> Iterator[list[Any]]:
    """What is called in the modules while the context is open, in this order."""
    calls: list[Any] = []

    def note(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not args[0].numel():
            return
        if isinstance(module, nn.Conv2d):
            calls.append(Convolution(tuple(args[0].shape), module))
        else:
            precision = torch.backends.mkldnn.matmul.fp32_precision
            calls.append(Product(args[0].numel() // module.in_features, module, precision))

    hooks = [
        part.register_forward_hook(note)
        for module in modules
        for part in module.modules()
        if isinstance(part, (nn.Linear, nn.Conv2d))
    ]
    attend = functional.scaled_dot_product_attention

    def noting(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append(Attention(tuple(tuple(states.shape) for states in (query, key, value)), kwargs))
        return attend(query, key, value, **kwargs)

    functional.scaled_dot_product_attention = noting  # type: ignore[assignment]
    try:
        yield calls
    finally:
        functional.scaled_dot_product_attention = attend
        for hook in hooks:
            hook.remove()


def floor_of(calls: list[Any], dtype: torch.dtype, device: torch.device, backward: bool = False) -> Callable[[], None]:
    """
    A function that does what was recorded, with the layers' own weights, so that these come through the same memory.

    Args:
        calls (`list`): From `recording`.
        dtype (`torch.dtype`), device (`torch.device`): Of the values.
        backward (`bool`, *optional*, defaults to `False`): Whether to do what a backward pass needs, too.
    """
    made: dict[Shape, torch.Tensor] = {}

    def values(shape: Shape) -> torch.Tensor:
        if shape not in made:
            made[shape] = torch.randn(shape, dtype=dtype, device=device)
        return made[shape]

    bare = [call.bare(values, backward) for call in calls]

    def run() -> None:
        with torch.set_grad_enabled(backward):
            for call in bare:
                call()

    return run
