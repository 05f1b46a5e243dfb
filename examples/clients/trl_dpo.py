# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Preferences by TRL's `DPOTrainer`, with a reference model, and with LoRA, which needs none: `pip install trl peft`."""

import tempfile
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import DPOConfig, DPOTrainer

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


SHOWN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
SAMPLES: dict[str, dict[str, Any]] = {
    "text": {
        "prompt": [{"role": "user", "content": "what is it?"}],
        "chosen": [{"role": "assistant", "content": "a red square"}],
        "rejected": [{"role": "assistant", "content": "a blue star"}],
    },
    "image": {
        "images": [Image.new("RGB", (64, 64), "red")],
        "prompt": SHOWN,
        "chosen": said("a red square"),
        "rejected": said("a blue star"),
    },
}


def main(checkpoint: str = "examples/shapes/checkpoint") -> None:
    def load() -> Any:
        return BagelForConditionalGeneration.from_pretrained(checkpoint)

    for name, sample in SAMPLES.items():
        for how, arguments in {
            "model": {"model": load()},
            "reference model": {"model": load(), "ref_model": load()},
            "name": {"model": checkpoint},
            "LoRA": {"model": load(), "peft_config": LoraConfig(r=4)},
        }.items():
            trainer = DPOTrainer(
                **arguments,
                args=DPOConfig(
                    tempfile.mkdtemp(),
                    max_steps=8,
                    learning_rate=1e-3,
                    per_device_train_batch_size=2,
                    report_to=[],
                    use_cpu=True,
                    bf16=False,
                    logging_steps=1,
                    save_strategy="no",
                    disable_tqdm=True,
                ),
                train_dataset=Dataset.from_list([sample] * 16),
                processing_class=BagelProcessor.from_pretrained(checkpoint),
            )
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            print(f"{name}, {how}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
            assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
