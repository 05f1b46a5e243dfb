"""`torch.export` at fixed shapes: text, a prompt with an image, and a denoising step after it, as three programs."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.conftest import conversation, max_error
from transformers_bagel import BagelForConditionalGeneration, PrefixBuffer, PrefixCache, PrefixView


class Program(nn.Module):
    """A forward of the model. What the shapes follow from are attributes of the module, where the exporter knows them."""

    def __init__(self, model: BagelForConditionalGeneration, forward: Callable, **known: torch.Tensor):
        super().__init__()
        self.model = model
        self.call = forward
        self.names = tuple(known)
        for name, tensor in known.items():
            setattr(self, name, tensor)

    def forward(self, *inputs):
        return self.call(self.model, *inputs, **{name: getattr(self, name) for name in self.names})


def exported(program: nn.Module, inputs: tuple) -> nn.Module:
    """Through a file, as it is meant to be used."""
    with torch.no_grad():
        made = torch.export.export(program.eval(), inputs)
    file = io.BytesIO()
    torch.export.save(made, file)
    file.seek(0)
    return torch.export.load(file).module()


@torch.no_grad()
def test_text_is_exported(model):
    program = Program(model, lambda model, ids: model(input_ids=ids, use_cache=False).logits)
    first, second = torch.randint(5, 400, (2, 1, 12), generator=torch.Generator().manual_seed(0))
    assert max_error(exported(program, (first,))(second), program(second)) <= 1e-5


def read(model, input_ids: torch.Tensor, pixel_values: torch.Tensor, image_grid_hw: torch.Tensor):
    outputs = model(input_ids=input_ids, pixel_values=pixel_values, image_grid_hw=image_grid_hw, use_cache=True)
    cache = outputs.past_key_values
    return outputs.logits, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


@torch.no_grad()
def test_a_prompt_with_an_image_is_exported(model, encode):
    inputs, other = encode(["@wide", "what?"]), encode(["@wide", "what!"])
    program = Program(model, read, image_grid_hw=inputs["image_grid_hw"])
    made = exported(program, (inputs["input_ids"], inputs["pixel_values"]))
    arguments = other["input_ids"], other["pixel_values"].flip(0)
    assert arguments[0].shape == inputs["input_ids"].shape
    for given, expected in zip(made(*arguments), program(*arguments), strict=True):
        pairs = [(given, expected)] if isinstance(given, torch.Tensor) else zip(given, expected, strict=True)
        assert all(max_error(*pair) <= 1e-4 for pair in pairs)


@torch.no_grad()
def test_a_denoising_step_is_exported(model, encode):
    """The prefix is an input, with scratch space behind it."""
    inputs = encode(["@wide", "make it green"])
    _, keys, values = read(model, inputs["input_ids"], inputs["pixel_values"], inputs["image_grid_hw"])
    length = keys[0].shape[2]

    def prefix(scale: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return tuple([nn.functional.pad(scale * states, (0, 0, 0, 14)) for states in part] for part in (keys, values))

    def step(model, latents, timesteps, keys, values, **known):
        # Two branches of guidance: with the prompt, and without anything.
        buffer = PrefixBuffer(keys, values, length)
        cache = PrefixCache([PrefixView(buffer), PrefixView(buffer, start=length)])
        return model(latents=latents, timesteps=timesteps, past_key_values=cache, **known).velocity

    known = {"latent_grid_hw": torch.tensor([[3, 4], [3, 4]]), "position_ids": torch.tensor([3, 0])}
    program = Program(model, step, **known)
    latents = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    made = exported(program, (latents[0], torch.tensor([1.0, 1.0]), *prefix(1.0)))
    expected = program(latents[1], torch.tensor([0.25, 0.25]), *prefix(0.9))
    assert max_error(made(latents[1], torch.tensor([0.25, 0.25]), *prefix(0.9)), expected) <= 1e-5


@pytest.mark.parametrize("messages", [["a red circle"], ["@tall", "and", "@square", "join them"]])
@torch.no_grad()
def test_a_prompt_is_exported_with_its_types(messages, model, processor):
    inputs = processor.apply_chat_template(
        conversation(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "pixel_values")}

    def forward(model, *given, **known):
        named = dict(zip(("input_ids", "pixel_values"), given, strict=False))
        return model(**named, **known, use_cache=False).logits

    arguments = tuple(inputs[name] for name in ("input_ids", "pixel_values") if name in inputs)
    program = Program(model, forward, **rest)
    assert max_error(exported(program, arguments)(*arguments), program(*arguments)) <= 1e-4
