"""FP8 made while a checkpoint is read. Its kernels need a GPU; what is loaded does not."""

from __future__ import annotations

import torch
from transformers import FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from tests.conftest import load_model


def test_fp8_weights_and_their_scales_are_made_while_loading(model, monkeypatch):
    """The tensors of the scales are in no file, and are no reason to refuse the checkpoint."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    quantized = load_model(quantization_config=FineGrainedFP8Config(weight_block_size=(32, 32)))
    name = "model.language_model.layers.0.mlp_moe_gen.up_proj"
    layer, expected = quantized.get_submodule(name), model.get_submodule(name).weight
    assert layer.weight.dtype == torch.float8_e4m3fn
    scales = layer.weight_scale_inv.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert (layer.weight.float() * scales - expected).abs().max() <= expected.abs().max() / 16
    assert type(quantized.model.vae2llm) is torch.nn.Linear
    # Layers of no whole number of blocks, as the MLP of the original vision tower with blocks of 128, stay as they are.
    assert type(quantized.model.vision_tower.encoder.layers[0].mlp.fc1) is torch.nn.Linear
