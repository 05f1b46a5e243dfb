"""Builders that all tests share: the golden set, the tiny checkpoint, its processor, and a conversation."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_bagel.published import load_published_vae
from transformers_bagel import BagelDataCollator, BagelForConditionalGeneration, BagelProcessor


if "PYTEST_XDIST_WORKER" in os.environ:
    # One core a worker: threads that wait for each other cost more than they give on tensors this small.
    torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden" / "a"
CHECKPOINT = GOLDEN / "checkpoint"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))


def edges(transform: list[int]) -> dict[str, int]:
    """A `[longest, shortest, stride]` of the golden set as the `size` of an image processor."""
    return {"longest_edge": transform[0], "shortest_edge": transform[1]}


def golden_image(name: str) -> Image.Image:
    return Image.open(GOLDEN / "inputs" / f"{name}.png")


def conversation(inputs: list[str]) -> list[dict]:
    """The golden notation as chat messages: `"@name"` is an image, anything else a text."""
    parts = [
        {"type": "image", "image": golden_image(item[1:])} if item.startswith("@") else {"type": "text", "text": item}
        for item in inputs
    ]
    return [{"role": "user", "content": parts}]


def turn(role: str, *parts) -> dict:
    """A message of texts, images, and parts that are already spelled out."""
    content = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        elif not (isinstance(part, dict) and "type" in part):
            part = {"type": "image", "image": part}
        content.append(part)
    return {"role": role, "content": content}


def training_samples(*names: str) -> list[dict]:
    """Conversations that differ in what they condition on and in what they learn."""
    square, wide, tall = (golden_image(name) for name in ("square", "wide", "tall"))
    known = {
        "talk": [turn("user", "hello"), turn("assistant", "hi there")],
        "look": [turn("user", wide, "how many shapes?"), turn("assistant", "three shapes, I think")],
        "draw": [turn("user", "a red circle"), turn("assistant", square)],
        "edit": [turn("user", tall, "make it green"), turn("assistant", wide)],
        "chat": [
            turn("user", "a red circle"),
            turn("assistant", "here", square),
            turn("user", "make it wide"),
            turn("assistant", wide),
            turn("user", "what is it?"),
            turn("assistant", "a wide circle"),
        ],
    }
    return [{"messages": known[name]} for name in names]


def load_model(**kwargs) -> BagelForConditionalGeneration:
    return BagelForConditionalGeneration.from_pretrained(CHECKPOINT, **kwargs)


def load_processor(path: Path = CHECKPOINT, **kwargs) -> BagelProcessor:
    sizes = {"size": edges(CASES["vit_transform"]), "vae_size": edges(CASES["vae_transform"])}
    return BagelProcessor.from_pretrained(path, **(sizes | kwargs))


def max_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return (actual.float() - expected.float()).abs().max().item()


def run_snippets(markdown: str) -> dict[str, Any]:
    """Run the Python of a card or page, one snippet after the other, and return its variables."""
    variables: dict[str, Any] = {"__name__": "snippet"}
    snippets = re.findall(r"```python\n(.*?)```", markdown, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "snippet", "exec"), variables)
    return variables


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def model() -> BagelForConditionalGeneration:
    """The tiny checkpoint; tests that change a model load their own."""
    return load_model()


@pytest.fixture(scope="session")
def processor() -> BagelProcessor:
    return load_processor()


@pytest.fixture(scope="session")
def vae():
    return load_published_vae(CHECKPOINT)


@pytest.fixture
def collate(processor, vae):
    """A collator without dropout, on the posterior's mean."""

    def make(**kwargs) -> BagelDataCollator:
        settings = {"vae_sample_mode": "argmax", "text_dropout": 0.0, "vit_dropout": 0.0, "vae_dropout": 0.0}
        return BagelDataCollator(processor, **({"vae": vae} | settings | kwargs))

    return make


@pytest.fixture
def encode(processor):
    """Golden inputs as model inputs: `encode(["@wide", "what?"])`, or a list of such lists for a batch."""

    def apply(inputs: list, add_generation_prompt: bool = True, **kwargs):
        batch = isinstance(inputs[0], list)
        messages = [conversation(item) for item in inputs] if batch else conversation(inputs)
        return processor.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **kwargs,
        )

    return apply
