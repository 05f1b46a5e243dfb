# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A training step of a LoRA, and how much of the card it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from bagel_training.throughput import StepFlops
from cases import PROMPT, picture, whole_collator
from peft import LoraConfig

from diffusers_bagel import BagelPipeline
from transformers_bagel import LORA_TARGETS


RANK = 16
# Operations a second of products in bfloat16 with float32 sums, without sparsity, by the vendors' data sheets:
# nvidia.com/data-center (h100, h200, a100, l40s, l4, the GH200 and B200 sheets; sheets that give sparse figures only are halved),
# the Ada architecture's white paper for RTX 4090, and amd.com/instinct for MI300X.
PEAKS = {
    "B200": 2250e12,
    "GH200": 990e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}
# Such a card has less than its name says: one for a notebook, a slice of one.
PARTIAL = (" Laptop ", " MIG ")


def peak_flops(card: str) -> float | None:
    """By the name that torch gives a card; `None` if it is not known."""
    words = f" {card.replace('-', ' ')} "
    if any(partial in words for partial in PARTIAL):
        return None
    return next((peak for name, peak in PEAKS.items() if f" {name} " in words), None)


@dataclass
class TrainingStep:
    """
    Forward, backward and AdamW of a LoRA on both experts, with activation checkpointing: what one card of 80 GB trains.

    Attributes:
        model: With the adapter.
        batch (`dict`): A drawing, and a question about a picture.
        optimizer (`torch.optim.Optimizer`)
        flops (`int`): Operations of a step, recomputation left out (`StepFlops`).
        tokens (`int`)
    """

    model: Any
    batch: Any
    optimizer: torch.optim.Optimizer
    flops: int
    tokens: int

    @classmethod
    def of(cls, pipe: BagelPipeline, pixels: int) -> TrainingStep:
        """It changes the pipeline's model for good."""
        model = pipe.transformer
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=RANK, target_modules=LORA_TARGETS["both"]))
        model.activation_checkpointing_enable()
        batch = whole_collator(pipe, return_layout=True)(samples(pixels)).to(model.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        flops = StepFlops(model)(batch["layout"])
        return cls(model.train(), batch, torch.optim.AdamW(trained), flops, batch["input_ids"].numel())

    def run(self) -> None:
        with torch.autocast(self.model.device.type, torch.bfloat16):
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def samples(pixels: int) -> list[dict[str, Any]]:
    text, image = {"type": "text", "text": PROMPT}, {"type": "image", "image": picture(pixels)}
    turns = (([text], [image]), ([image, text], [text]))
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in turns
    ]
