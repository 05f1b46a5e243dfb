"""Ways to quantise that tests share."""

from __future__ import annotations

from typing import Any

from transformers import BitsAndBytesConfig, TorchAoConfig


def torchao_int8(**kwargs: Any) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), **kwargs)


def bitsandbytes_int8(**kwargs: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, **kwargs)


def bitsandbytes_nf4(**kwargs: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **kwargs)


QUANTIZATIONS = [torchao_int8, bitsandbytes_int8, bitsandbytes_nf4]


def quantized_layers(model: Any) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if type(getattr(module, "weight", None)).__name__ in ("Int8Tensor", "Int8Params", "Params4bit")
    }
