"""Quantised weights draw nearly the same: torchao int8 and float8, bitsandbytes int8 and nf4."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from tests.gpu.common import GPU, drawn, load, load_shapes
from tests.quantization import QUANTIZATIONS, quantized_layers


INSTALLED = {"torchao": is_torchao_available, "bitsandbytes": is_bitsandbytes_available}


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not INSTALLED[library](), reason=f"{library} is not installed")


@pytest.mark.parametrize(
    "quantize",
    [pytest.param(quantize, marks=needs(quantize.__name__.partition("_")[0])) for quantize in QUANTIZATIONS],
    ids=lambda quantize: quantize.__name__,
)
def test_weights(quantize, on_gpu, within):
    pipe = load(quantization_config=quantize(), dtype=torch.bfloat16).to(GPU)
    assert quantized_layers(pipe.transformer)
    error = (drawn(pipe).float() - drawn(on_gpu)).abs().mean().item()
    assert error > 0
    within(error, 0.1)


@needs("torchao")
def test_float8_products_of_torchao():
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig
    from transformers import TorchAoConfig

    if GPU.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a card with float8 products")
    config = TorchAoConfig(Float8DynamicActivationFloat8WeightConfig())
    pipe = load_shapes(dtype=torch.bfloat16, quantization_config=config)
    assert pipe("a red circle", num_inference_steps=4, output_type="pt").images.isfinite().all()
