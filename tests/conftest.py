"""Builders that all tests share: the golden set, the tiny checkpoint, its processor, and a conversation."""

from __future__ import annotations

import gc
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from accelerate.utils import send_to_device
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

from diffusers_bagel import BagelPipeline
from diffusers_bagel.loading import load_original_vae
from tests import rounded_convolutions  # noqa: F401
from transformers_bagel import BagelDataCollator, BagelForConditionalGeneration, BagelProcessor


if "PYTEST_XDIST_WORKER" in os.environ:
    # One core a worker: threads that wait for each other cost more than they give on tensors this small.
    torch.set_num_threads(1)
    # Processes that tests start share the cores with the other worker, too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What is imported by now stays, and a training collects garbage twice: its search of all that took half of the time."""
    gc.collect()
    gc.freeze()


# Where models of the tests lie: BAGEL_TEST_DEVICE=cuda runs on a GPU what runs on a CPU here (`scripts/gpu.sh`).
DEVICE = torch.device(os.environ.get("BAGEL_TEST_DEVICE", "cpu"))
# The golden numbers are of float32, which cuDNN's convolutions round by default.
torch.backends.cudnn.allow_tf32 = False
GOLDEN = Path(__file__).parent / "golden" / "a"
CHECKPOINT = GOLDEN / "checkpoint"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))


def edges(transform: list[int]) -> dict[str, int]:
    """A `[longest, shortest, stride]` of the golden set as the `size` of an image processor."""
    return {"longest_edge": transform[0], "shortest_edge": transform[1]}


def golden_image(name: str) -> Image.Image:
    return Image.open(GOLDEN / "inputs" / f"{name}.png")


def phone_photo(orientation: int) -> tuple[bytes, Image.Image]:
    """A JPEG whose EXIF data say how it was held, and the picture as it should be seen."""
    stream = io.BytesIO()
    image = golden_image("wide").convert("RGB")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(stream, "JPEG", exif=exif)
    lying = np.asarray(Image.open(io.BytesIO(stream.getvalue())))
    mirrored = lying[:, ::-1] if orientation in (2, 4, 5, 7) else lying
    quarters = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]
    return stream.getvalue(), Image.fromarray(np.ascontiguousarray(np.rot90(mirrored, quarters)))


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
    model = BagelForConditionalGeneration.from_pretrained(CHECKPOINT, **kwargs)
    # Some are placed by what loads them.
    if DEVICE.type == "cpu" or kwargs.keys() & {"device_map", "quantization_config"}:
        return model
    model.register_forward_pre_hook(
        lambda module, args, kwargs: send_to_device((args, kwargs), module.device), with_kwargs=True
    )
    return model.to(DEVICE)


def load_processor(path: Path = CHECKPOINT, **kwargs) -> BagelProcessor:
    sizes = {"size": edges(CASES["vit_transform"]), "vae_size": edges(CASES["vae_transform"])}
    return BagelProcessor.from_pretrained(path, **(sizes | kwargs))


def max_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return (actual.cpu().float() - expected.cpu().float()).abs().max().item()


@contextmanager
def counted_sdpa() -> Iterator[list[int]]:
    """How often torch's attention is called: `calls[0]`."""
    calls, attend = [0], functional.scaled_dot_product_attention

    def count(*args, **kwargs):
        calls[0] += 1
        return attend(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", count)
        yield calls


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
    return load_original_vae(CHECKPOINT).to(DEVICE)


@pytest.fixture
def talker(processor) -> BagelPipeline:
    """A pipeline without the modules that draw."""
    return BagelPipeline(load_model(visual_gen=False), None, FlowMatchEulerDiscreteScheduler(), processor)


class PickyVae:
    """A VAE that turns wide images into NaN, as one in a coarse precision does with some images."""

    def __init__(self, vae):
        self.vae = vae
        self.config, self.dtype, self.device = vae.config, vae.dtype, vae.device

    def state_dict(self):
        return self.vae.state_dict()

    def encode(self, pixels):
        height, width = pixels.shape[-2:]
        return self.vae.encode(pixels * (float("nan") if width > height else 1))


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
        ).to(DEVICE)

    return apply


def plain_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    """What flash-attn's varlen function computes, written out: `(tokens, heads, head_dim)`, packed sequences."""
    outputs = []
    bounds = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
    for q_start, q_stop, k_start, k_stop in bounds:
        query, key, value = q[q_start:q_stop], k[k_start:k_stop], v[k_start:k_stop]
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * softmax_scale
        if causal:
            rows, columns = scores.shape[1:]
            # Bottom-right aligned: the last query sees every key.
            hidden = torch.arange(columns)[None, :] > torch.arange(rows)[:, None] + columns - rows
            scores = scores.masked_fill(hidden, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.cat(outputs)


def plain_flash(q, k, v, softmax_scale=None, causal=False):
    rows = [
        plain_varlen(*row, torch.tensor([0, q.shape[1]]), torch.tensor([0, k.shape[1]]), 0, 0, softmax_scale, causal)
        for row in zip(q, k, v, strict=True)
    ]
    return torch.stack(rows)


@pytest.fixture
def flash(monkeypatch):
    """The model under flash attention 2, whose kernels are replaced by plain functions."""
    functions = (plain_flash, plain_varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    model = load_model()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "flash_attention_2"
    yield model
    flash_utils._loaded_implementation = None
