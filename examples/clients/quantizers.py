# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Quantised while it loads, to talk, to draw and to train a LoRA: `pip install optimum-quanto torchao bitsandbytes peft`."""

from typing import Any

import torch
from peft import LoraConfig
from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelForConditionalGeneration, BagelProcessor


CONFIGS = {
    "Quanto int8": QuantoConfig(weights="int8"),
    "Quanto int4": QuantoConfig(weights="int4"),
    "Quanto float8": QuantoConfig(weights="float8"),
    "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
    # Its weights have no backward.
    "torchao int8, activations too": TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "torchao float8": TorchAoConfig(Float8WeightOnlyConfig()),
    "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4 bits": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
}


def main(checkpoint: str = "examples/shapes/checkpoint") -> None:
    tokenizer = BagelProcessor.from_pretrained(checkpoint).tokenizer
    ids = tokenizer("a large red star in the middle on a white background", return_tensors="pt")["input_ids"]

    def load(config: Any) -> Any:
        return BagelForConditionalGeneration.from_pretrained(checkpoint, quantization_config=config)

    with torch.no_grad():
        expected = load(None)(input_ids=ids).logits.flatten()
    for name, config in CONFIGS.items():
        model = load(config)
        with torch.no_grad():
            logits = model(input_ids=ids).logits.float().flatten()
        agreement = float(torch.corrcoef(torch.stack([logits, expected]))[0, 1])
        pipe = BagelPipeline.from_pretrained(checkpoint, quantization_config=config)
        pipe.set_progress_bar_config(disable=True)
        image = pipe("a red circle", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
        trained = "no training"
        if "activations" not in name:
            model.add_adapter(LoraConfig(r=2))
            model.train()(input_ids=ids, labels=ids).loss.backward()
            gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
            assert gradients and all(gradient is not None for gradient in gradients)
            trained = f"{len(gradients)} gradients of a LoRA"
        print(f"{name}: logits correlate by {agreement:.4f}, {image.size[0]} pixels drawn, {trained}")
        assert agreement > 0.99


if __name__ == "__main__":
    main()
