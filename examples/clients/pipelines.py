# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The pipelines of transformers: text, text about pictures, and pictures.

    python examples/clients/pipelines.py

The library's any-to-any pipeline asks for torchvision, of which BAGEL needs nothing. Where it is not installed, this
example says that it is; do so in tests only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import pipeline
from transformers.utils import import_utils

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelProcessor


CHECKPOINT = str(Path(__file__).parents[1] / "shapes" / "checkpoint")


def main() -> None:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 20, 44, 44), fill="red")
    question = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": "what colour is the circle?"}],
        }
    ]
    words = [{"role": "user", "content": "a large red circle"}]
    short = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False}

    text = pipeline(
        "text-generation", model=CHECKPOINT, tokenizer=BagelProcessor.from_pretrained(CHECKPOINT).tokenizer
    )
    print("text-generation     ", text(words, max_new_tokens=24, do_sample=False)[0]["generated_text"][-1])
    sees = pipeline("image-text-to-text", model=CHECKPOINT)
    print("image-text-to-text  ", sees(text=question, **short)[0]["generated_text"])

    if not import_utils.is_torchvision_available():
        import_utils.BACKENDS_MAPPING["torchvision"] = (lambda: True, "")
    draws = pipeline("any-to-any", model=CHECKPOINT)
    print("any-to-any          ", draws(text=question, **short)[0]["generated_text"])
    own = BagelPipeline.from_pretrained(CHECKPOINT)
    edit = [{"role": "user", "content": [question[0]["content"][0], {"type": "text", "text": "make the circle blue"}]}]  # type: ignore[index]
    for messages in (words, edit):
        settings = {"num_inference_steps": 25, "guidance_scale": 3.0}
        generator = torch.Generator().manual_seed(0)
        (made,) = draws(text=messages, generation_mode="image", generate_kwargs={**settings, "generator": generator})
        expected = own(messages=messages, generator=torch.Generator().manual_seed(0), **settings).images[0]
        assert np.array_equal(np.asarray(made["generated_image"]), np.asarray(expected))
        print("any-to-any          ", made["generated_image"].size, "as BagelPipeline draws it")


if __name__ == "__main__":
    main()
