# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""By what a CPU multiplies matrices in float32: MKL, which torch takes, or oneDNN, which is twice as fast on some (docs/speed.md).

torch's setting for oneDNN is of the process, and is named after bfloat16, to which products are rounded on CPUs with a matrix unit for
it. So both are measured, time and error, and the setting is in force only while a forward of BAGEL runs. Who has chosen a precision
has chosen for these products, too: then nothing is measured, set or put back.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import is_torchdynamo_compiling, logging


logger = logging.get_logger(__name__)

# torch's setting where nobody has chosen, and where oneDNN multiplies.
DEFAULT, BY_ONEDNN = "none", "bf16"
# Tokens of a forward from which on oneDNN may multiply: of fewer it gains less, and of one it loses.
LEAST_TOKENS = 128
# What narrower products take is so little that the two hardly differ, now one way and now the other.
LEAST_WIDTH = 512
# By which oneDNN must be faster, so that the choice is the same in each run; and the largest error of a product in float32,
# by its largest value. Rounding to bfloat16 gives some 1e-3.
LEAST_GAIN = 1.25
LARGEST_ERROR = 1e-5
# Of a measured product, the most columns and rows of its weight; and how often each is taken.
MOST_COLUMNS, MOST_ROWS = 1024, 4096
REPEATS = 5


@dataclass(frozen=True)
class Products:
    """
    What products of float32 take on this CPU.

    Attributes:
        mkl, onednn (`float`): Seconds of one.
        error (`float`): Of oneDNN's, by the largest value.
    """

    mkl: float
    onednn: float
    error: float

    @property
    def by_onednn(self) -> bool:
        """Whether oneDNN is to multiply."""
        return self.error <= LARGEST_ERROR and self.mkl >= LEAST_GAIN * self.onednn

    def __str__(self) -> str:
        if self.error > LARGEST_ERROR:
            return f"products of float32 by MKL: oneDNN would round them to bfloat16 (error {self.error:.0e})"
        times = f"{self.mkl / self.onednn:.1f} times as fast as MKL"
        return f"products of float32 by {'oneDNN' if self.by_onednn else 'MKL'}: oneDNN is {times} (error {self.error:.0e})"


class _Setting:
    """That of the process, which the first of those who want it sets, and the last one puts back."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.is_ours = False

    def chosen(self) -> str | None:
        """What somebody else has chosen, for these products or for all."""
        with self.lock:
            found = _precision()
            return None if self.is_ours or found == DEFAULT else found

    def take(self) -> None:
        with self.lock:
            if self.users == 0 and _precision() == DEFAULT:
                _set_precision(BY_ONEDNN)
                self.is_ours = True
            self.users += 1

    def put_back(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.is_ours:
                self.is_ours = False
                # Somebody may have chosen something else meanwhile.
                if _precision() == BY_ONEDNN:
                    _set_precision(DEFAULT)

    @contextmanager
    def at(self, precision: str) -> Iterator[None]:
        """One value for as long as it takes to measure, whoever wants what."""
        with self.lock:
            found = _precision()
            _set_precision(precision)
            try:
                yield
            finally:
                _set_precision(found)


_setting = _Setting()


def _precision() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def _set_precision(value: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = value


@contextmanager
def onednn_products() -> Iterator[None]:
    """Products of float32 by oneDNN, in all threads, until the last who wants it leaves; unless somebody has chosen otherwise."""
    _setting.take()
    try:
        yield
    finally:
        _setting.put_back()


def products_of(config: Any) -> Products | None:
    """What was measured for a model of this configuration; `None` where there is no choice, or somebody has made it."""
    if _setting.chosen() is not None:
        return None
    text = config.get_text_config()
    return measured(text.hidden_size, text.intermediate_size)


def told_products(config: Any) -> str:
    """What is chosen for a model of this configuration, in a line."""
    if (chosen := _setting.chosen()) is not None:
        return f"products of float32 by the precision that was chosen for them, {chosen}"
    products = products_of(config)
    if products is not None:
        return str(products)
    reason = "such narrow ones hardly differ" if torch.backends.mkldnn.is_available() else "it has no oneDNN"
    return f"products of float32 by torch's default: {reason}"


@functools.cache
def measured(width: int, hidden: int) -> Products | None:
    """
    Time and error of a product of [`LEAST_TOKENS`] tokens, in a tenth of a second, once a process; `None` where there is no choice.

    Args:
        width, hidden (`int`): Of the model, and inside its MLP.
    """
    if width < LEAST_WIDTH or not torch.backends.mkldnn.is_available():
        return None
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(LEAST_TOKENS, min(width, MOST_COLUMNS), generator=generator)
    weight = torch.randn(min(hidden, MOST_ROWS), tokens.shape[1], generator=generator)
    exact = tokens.double() @ weight.double().T
    mkl, onednn = [], []
    with torch.no_grad():
        for _ in range(REPEATS):
            mkl.append(_timed(tokens, weight, DEFAULT)[0])
            seconds, product = _timed(tokens, weight, BY_ONEDNN)
            onednn.append(seconds)
    # The first ones warm up.
    found = Products(min(mkl[1:]), min(onednn[1:]), float((product - exact).abs().max() / exact.abs().max()))
    logger.info(str(found))
    return found


def _timed(tokens: torch.Tensor, weight: torch.Tensor, precision: str) -> tuple[float, torch.Tensor]:
    with _setting.at(precision):
        start = time.perf_counter()
        product = torch.nn.functional.linear(tokens, weight)
        return time.perf_counter() - start, product


def by_best_products(forward: Callable) -> Callable:
    """Let a model's `forward` multiply by what is faster on this CPU, where it is in float32 and takes no gradients."""

    @functools.wraps(forward)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        has_choice = not is_torchdynamo_compiling() and _num_tokens(args, kwargs) >= LEAST_TOKENS
        if has_choice and not torch.is_grad_enabled() and self.device.type == "cpu" and self.dtype == torch.float32:
            products = products_of(self.config)
            if products is not None and products.by_onednn:
                with onednn_products():
                    return forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return called


def _num_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of a forward: text of all samples, or latents of all images."""
    given = args[0] if args else kwargs.get("input_ids")
    states = next((kwargs[name] for name in ("inputs_embeds", "latents") if kwargs.get(name) is not None), None)
    # What is no tensor is refused by the forward itself.
    if isinstance(given, torch.Tensor):
        return given.numel()
    return states.shape[:-1].numel() if isinstance(states, torch.Tensor) else 0
