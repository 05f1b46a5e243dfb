# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Pictures and answers of a model in training, for the trackers and for the eye."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator

from diffusers_bagel import BagelPipeline


MAX_ANSWER_TOKENS = 256


class Validation:
    """
    Draws `--validation_prompt` and answers `--validation_question`.

    Args:
        args (`argparse.Namespace`): See `arguments.py`.
        accelerator (`Accelerator`)
        pipe ([`BagelPipeline`]): Around the model in training.
        on_every_rank (`bool`): Whether all processes take part, as a sharded model needs; else the main one does.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, pipe: BagelPipeline, on_every_rank: bool):
        self.args = args
        self.accelerator = accelerator
        self.pipe = pipe
        self.on_every_rank = on_every_rank
        self.pipe.set_progress_bar_config(disable=True)

    @property
    def is_wanted(self) -> bool:
        """Whether there is anything to draw or to answer."""
        return bool(self.args.validation_prompt or self.args.validation_question)

    def __call__(self, step: int) -> None:
        """Write the pictures and the answer to OUTPUT_DIR/validation, and to the trackers."""
        if not (self.accelerator.is_main_process or self.on_every_rank):
            return
        with torch.no_grad():
            images = self._images() if self.args.validation_prompt else []
            answer = self._answer() if self.args.validation_question else None
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.args.output_dir) / "validation"
        folder.mkdir(exist_ok=True)
        for index, image in enumerate(images):
            image.save(folder / f"step_{step}_{index}.png")
        if answer is not None:
            (folder / f"step_{step}.txt").write_text(answer, encoding="utf-8")
        self._log(step, images, answer)

    def _images(self) -> list[PIL.Image.Image]:
        height, width = self.args.validation_size or (None, None)
        return [
            self.pipe(
                prompt=self.args.validation_prompt,
                image=self.args.validation_image,
                height=height,
                width=width,
                num_inference_steps=self.args.validation_inference_steps,
                guidance_scale=self.args.guidance_scale,
                generator=torch.Generator().manual_seed(self.args.seed + index),
            ).images[0]
            for index in range(self.args.num_validation_images)
        ]

    def _answer(self) -> str:
        parts = [{"type": "text", "text": self.args.validation_question}]
        if self.args.validation_image:
            parts.insert(0, {"type": "image", "image": self.args.validation_image})
        inputs = self.pipe.processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.accelerator.device)
        ids = self.pipe.transformer.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        return self.pipe.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _log(self, step: int, images: list[PIL.Image.Image], answer: str | None) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                for index, image in enumerate(images):
                    tracker.writer.add_image(f"validation/{index}", np.asarray(image), step, dataformats="HWC")
                if answer is not None:
                    tracker.writer.add_text("validation/answer", answer, step)
            if tracker.name == "wandb":
                import wandb

                pictures = [wandb.Image(image, caption=self.args.validation_prompt) for image in images]
                tracker.log({"validation": pictures, "validation/answer": answer}, step=step)
