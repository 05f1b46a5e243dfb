# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Muon for the matrices of a model, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


# Tables and heads: each of their rows is a thing of its own, which orthogonal updates would mix.
NOT_FOR_MUON = (nn.Embedding,)


class _InFloat32(TorchFunctionMode):
    """Torch's `Muon` makes updates orthogonal in bfloat16. A CPU without AVX-512 multiplies that some ten to ninety times slower
    than float32, in which it is done here.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].clone() if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


class MuonWithAdamW(torch.optim.Optimizer):
    """
    torch's `Muon` and `AdamW` behind one interface: one learning rate for both, one state to save.

    Muon's updates are scaled to the size of AdamW's, so that a learning rate means the same for both.

    Args:
        matrices (`Iterable[nn.Parameter]`):
            For Muon: weights of linear layers, `(out, in)`, and of convolutions, `(out, in, height, width)`, which it
            takes as `(out, in * height * width)`.
        others (`Iterable[nn.Parameter]`): For AdamW: embeddings, heads, norms, biases.
        lr (`float`): Learning rate.
        betas, weight_decay, eps: Of AdamW; the weight decay is Muon's too.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ):
        matrices = list(matrices)
        # Views share their parameter's storage, so that an update of one is an update of the other.
        self._views = {
            parameter: nn.Parameter(parameter.detach().view(len(parameter), -1))
            for parameter in matrices
            if parameter.ndim > 2
        }
        others = list(others)
        # Neither part takes an empty list: a LoRA has matrices alone.
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            views = [self._views.get(parameter, parameter) for parameter in matrices]
            muon = torch.optim.Muon(views, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps))
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """The parts work on the groups and the state of the whole; each has one group."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, view in self._views.items():
            view.grad = None if parameter.grad is None else parameter.grad.view_as(view)
        devices = {parameter.device.type for group in self.param_groups for parameter in group["params"]}
        is_slow = devices == {"cpu"} and torch.backends.cpu.get_cpu_capability() != "AVX512"
        with _InFloat32() if is_slow else nullcontext():
            for part in self._parts:
                part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for parameter in self._views:
            parameter.grad = None


def split_parameters(
    model: nn.Module, not_for_muon: Iterable[str] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained parameters for Muon, and the others.

    Args:
        model (`nn.Module`)
        not_for_muon (`Iterable[str]`): Names of more modules whose matrices are not for Muon: heads.
    """
    excluded = {
        parameter
        for name, module in model.named_modules()
        if isinstance(module, NOT_FOR_MUON) or name in not_for_muon
        for parameter in module.parameters(recurse=False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2 and parameter not in excluded]
    chosen = set(matrices)
    return matrices, [parameter for parameter in trained if parameter not in chosen]
