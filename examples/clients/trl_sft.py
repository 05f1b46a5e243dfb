# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning by TRL's `SFTTrainer`: `pip install trl`.

With plain `messages` TRL takes everything as a target, the questions and the places of images too; `assistant_only_loss=True` and
prompts with completions learn the answers alone.
"""

import tempfile
from typing import Any

from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor


RED = Image.new("RGB", (64, 64), "red")
QUESTION = {"role": "user", "content": "what is it?"}
ANSWER = {"role": "assistant", "content": "a red square"}
SHOWN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
SAID = {"role": "assistant", "content": [{"type": "text", "text": "a red square"}]}
SAMPLES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [QUESTION, ANSWER]},
    "prompt and completion": {"prompt": [QUESTION], "completion": [ANSWER]},
    "messages with an image": {"messages": [SHOWN, SAID], "images": [RED]},
    "prompt and completion with an image": {"prompt": [QUESTION], "completion": [ANSWER], "images": [RED]},
}


def main(checkpoint: str = "examples/shapes/checkpoint") -> None:
    processor = BagelProcessor.from_pretrained(checkpoint)
    for name, sample in SAMPLES.items():
        # A model by its name, too.
        for model in (checkpoint, BagelForConditionalGeneration.from_pretrained(checkpoint)):
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(
                    tempfile.mkdtemp(),
                    max_steps=8,
                    learning_rate=1e-3,
                    assistant_only_loss="messages" in sample,
                    report_to=[],
                    use_cpu=True,
                    bf16=False,
                    logging_steps=1,
                    save_strategy="no",
                    disable_tqdm=True,
                ),
                train_dataset=Dataset.from_list([sample] * 16),
                processing_class=processor,
            )
            batch = next(iter(trainer.get_train_dataloader()))
            targets = batch["input_ids"][0][batch["labels"][0] != -100]
            learned = processor.tokenizer.decode(targets)
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            print(f"{name}: learns {learned!r}, loss {losses[0]:.2f} -> {losses[-1]:.2f}")
            assert learned == "a red square<|im_end|>"
            assert losses[-1] < losses[0] / 2


if __name__ == "__main__":
    main()
