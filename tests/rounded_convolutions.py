"""Convolutions in bfloat16 on CPUs that have no kernel for them: the golden VAE takes 60 times as long as in float32."""

from __future__ import annotations

import torch
from torch.nn import functional


def rounded_conv2d(input, weight, bias=None, *args, conv2d=functional.conv2d, **kwargs):
    """A convolution whose bfloat16 is added up in float32 and then rounded, as it is anyway, by a kernel for float32."""
    if input.dtype != torch.bfloat16:
        return conv2d(input, weight, bias, *args, **kwargs)
    bias = None if bias is None else bias.float()
    return conv2d(input.float(), weight.float(), bias, *args, **kwargs).to(torch.bfloat16)


if torch.backends.cpu.get_cpu_capability() != "AVX512":
    functional.conv2d = rounded_conv2d
