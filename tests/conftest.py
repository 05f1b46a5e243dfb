"""Builders that all tests share: the golden set, the tiny checkpoint, its processor, and a conversation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor


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


def load_model(**kwargs) -> BagelForConditionalGeneration:
    return BagelForConditionalGeneration.from_pretrained(CHECKPOINT, **kwargs)


def load_processor(path: Path = CHECKPOINT, **kwargs) -> BagelProcessor:
    sizes = {"size": edges(CASES["vit_transform"]), "vae_size": edges(CASES["vae_transform"])}
    return BagelProcessor.from_pretrained(path, **(sizes | kwargs))


def max_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return (actual.float() - expected.float()).abs().max().item()


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
