# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A Gradio app with one pipeline, used by two browsers at once: `pip install gradio`."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gradio
import torch
from gradio_client import Client, handle_file
from PIL import Image

from diffusers_bagel import BagelPipeline


PROMPTS = (
    "a large red star in the middle on a white background",
    "a medium white circle at the top left on a black background",
)


def app(pipe: BagelPipeline) -> gradio.Blocks:
    """Draws from a prompt, or changes an image."""

    def draw(prompt: str, image: Image.Image | None, seed: float) -> Image.Image:
        generator = torch.Generator().manual_seed(int(seed))
        return pipe(prompt, image=image, num_inference_steps=10, generator=generator).images[0]

    inputs = [gradio.Textbox(), gradio.Image(type="pil"), gradio.Number()]
    # One pipeline serves several calls at a time; a GPU draws one after the other faster.
    return gradio.Interface(draw, inputs, gradio.Image(type="pil", format="png"), api_name="draw", concurrency_limit=2)


def main(checkpoint: str = "examples/shapes/checkpoint") -> None:
    pipe = BagelPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    demo = app(pipe)
    demo.queue()
    _, url, _ = demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    os.environ["no_proxy"] = "127.0.0.1,localhost"
    try:
        browsers = [Client(url, verbose=False) for _ in PROMPTS]

        def visit(browser: Client, prompt: str) -> list[Any]:
            drawn = browser.predict(prompt, None, 0, api_name="/draw")
            edited = browser.predict("make it green", handle_file(drawn), 1, api_name="/draw")
            return [Image.open(path).convert("RGB") for path in (drawn, edited)]

        one_by_one = [visit(*each) for each in zip(browsers, PROMPTS, strict=True)]
        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            at_once = list(threads.map(visit, browsers, PROMPTS))
    finally:
        demo.close()
    same = [
        alone.tobytes() == together.tobytes()
        for first, second in zip(one_by_one, at_once, strict=True)
        for alone, together in zip(first, second, strict=True)
    ]
    print(f"{len(same)} pictures of two browsers at once, as from one after the other: {sum(same)}")
    assert all(same)
    assert one_by_one[0][0].tobytes() != one_by_one[1][0].tobytes()


if __name__ == "__main__":
    main()
