# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Rewards by TRL's `GRPOTrainer`, with images: `pip install trl peft`.

GRPO passes on the inputs whose names it knows. Among them is `image_grid_thw`, which the processor gives when it is asked to.
"""

import tempfile
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import GRPOConfig, GRPOTrainer

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor


SAMPLE = {
    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}],
    "images": [Image.new("RGB", (64, 64), "red")],
}


def longer(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def main(checkpoint: str = "examples/shapes/checkpoint") -> None:
    processor = BagelProcessor.from_pretrained(checkpoint, return_image_grid_thw=True)
    for name, settings, arguments in (
        ("alone", {}, {}),
        ("beside the model at the start", {"beta": 0.1}, {}),
        ("LoRA", {}, {"peft_config": LoraConfig(r=4)}),
    ):
        trainer = GRPOTrainer(
            model=BagelForConditionalGeneration.from_pretrained(checkpoint),
            reward_funcs=longer,
            args=GRPOConfig(
                tempfile.mkdtemp(),
                max_steps=4,
                learning_rate=1e-4,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=8,
                report_to=[],
                use_cpu=True,
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=Dataset.from_list([SAMPLE] * 16),
            processing_class=processor,
            **arguments,
        )
        trainer.train()
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        print(f"{name}: rewards {', '.join(f'{reward:.1f}' for reward in rewards)}")
        assert len(rewards) == 4


if __name__ == "__main__":
    main()
