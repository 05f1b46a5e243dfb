"""Training: losses and gradients are those of the CPU, the loader encodes on the device, `Trainer` in each precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig

from tests.conftest import max_error, training_samples
from tests.gpu.common import GPU, model_of, needs_accelerator
from transformers_bagel import LORA_TARGETS, BagelDataLoader
from transformers_bagel.attention import NO_FLEX_BACKWARD
from transformers_bagel.training.trainer import BagelTrainer


no_flex = pytest.mark.skipif(GPU.type in NO_FLEX_BACKWARD, reason=f"flex attention has no backward on {GPU.type}")


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=no_flex)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_as_on_the_cpu(implementation, checkpointing, batch, within):
    found = []
    for device, attention in ((torch.device("cpu"), "sdpa"), (GPU, implementation)):
        model = model_of(attn_implementation={"text_config": attention, "vision_config": "sdpa"}).to(device).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        out = model(**batch.to(device))
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(gradients | {"loss": out.loss.detach()})
    on_cpu, on_device = found
    assert on_cpu.keys() == on_device.keys()
    within(max(max_error(on_device[name], value) for name, value in on_cpu.items()), 1e-4)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=needs_accelerator)])
def test_the_loader_encodes_on_the_device(workers, collator):
    samples = training_samples("draw", "edit", "look") * 4
    loader = BagelDataLoader(samples, collator, batch_size=2, num_workers=workers)
    model = model_of().to(GPU).train()
    for _, batch in zip(range(2), loader, strict=False):
        assert model(**batch.to(GPU)).loss.isfinite()


@needs_accelerator
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_trainer(precision, collator, tmp_path):
    from transformers import TrainingArguments

    model = model_of()
    model.add_adapter(LoraConfig(r=4, target_modules=LORA_TARGETS["gen"]))
    args = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        remove_unused_columns=False,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
    )
    samples = training_samples("draw", "edit", "look", "talk") * 4
    trainer = BagelTrainer(model=model, args=args, train_dataset=samples, data_collator=collator)
    assert np.isfinite(trainer.train().training_loss)
    assert model.device.type == GPU.type
