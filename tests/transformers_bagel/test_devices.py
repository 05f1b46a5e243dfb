"""On one accelerator and on two: no operator mixes devices, and the host reads back only what it must."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from tests.conftest import conversation, load_model, max_error
from tests.emulated_devices import EmulatedDevices, numbers, on, place
from transformers_bagel import GrowingCache, PrefixCache
from transformers_bagel.segments import chat_segments
from transformers_bagel.sequence import SequenceLayout, lay_out


GRID = torch.tensor([[2, 3]])


def one_device(name: str) -> str:
    return "meta:0"


def two_devices(name: str) -> str:
    """Where `device_map="auto"` puts a model that fills one device and a half."""
    first = ("model.language_model.embed_tokens", "model.language_model.layers.0", "model.language_model.rotary_emb")
    return "meta:0" if name.startswith(first) else "meta:1"


def placed(device_of) -> torch.nn.Module:
    """The tiny model on emulated devices, with the hooks that accelerate's `dispatch_model` puts there."""
    model = load_model(attn_implementation="eager")
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        is_block = parent.endswith("language_model.layers") or last in (
            *("embed_tokens", "rotary_emb", "norm", "norm_moe_gen", "vision_tower", "connector", "vit_pos_embed"),
            *("time_embedder", "vae2llm", "llm2vae", "latent_pos_embed", "lm_head"),
        )
        if is_block and device_of is two_devices:
            hook = AlignDevicesHook(execution_device=torch.device(device_of(name)))
            hook.init_hook = lambda module: module
            add_hook_to_module(module, hook)
    return place(model, device_of)


def prompt(processor, *parts: str) -> tuple[dict, torch.Tensor]:
    """What the pipeline passes to a forward for a prompt, on the CPU, and the next position."""
    segments = processor.encode_segments(chat_segments(conversation(list(parts)), generation_mode="image"))
    sequence = lay_out(segments)
    grids = {
        kind: torch.tensor([segment.grid for segment in segments if segment.segment.type == kind]).reshape(-1, 2)
        for kind in ("vit_image", "vae_image")
    }
    layout = SequenceLayout(
        sequence.token_types[None], image_grid_hw=grids["vit_image"].long(), latent_grid_hw=grids["vae_image"].long()
    )
    inputs = {"input_ids": sequence.input_ids[None], "position_ids": sequence.position_ids[None]}
    if len(grids["vit_image"]):
        count = int(grids["vae_image"].prod(-1).sum())
        patches = [segment.pixels for segment in segments if segment.segment.type == "vit_image"]
        inputs["pixel_values"] = torch.cat(patches)
        inputs["latents"] = torch.randn(count, 16, generator=torch.Generator().manual_seed(0))
        inputs["timesteps"] = torch.zeros(len(grids["vae_image"]))
    return inputs | {"layout": layout}, sequence.position_ids[-1:] + 1


def moved(inputs: dict) -> dict:
    return {name: on("meta:0", value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def step(position_ids: torch.Tensor) -> dict:
    latents = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    return {"latents": latents, "timesteps": torch.tensor([0.7]), "latent_grid_hw": GRID, "position_ids": position_ids}


@pytest.mark.parametrize("device_of", [one_device, two_devices])
@pytest.mark.parametrize("parts", [("a red circle",), ("@wide", "and", "@square", "join them")])
@torch.no_grad()
def test_drawing_mixes_no_devices_and_reads_nothing_back(device_of, parts, processor):
    inputs, position = prompt(processor, *parts)
    plain, model = load_model(attn_implementation="eager"), placed(device_of)
    cache = GrowingCache(plain.config)
    logits = plain(**inputs, past_key_values=cache, use_cache=True).logits
    velocity = plain(**step(position), past_key_values=PrefixCache.from_cache(cache, scratch=8)).velocity

    with EmulatedDevices() as devices:
        cache = GrowingCache(model.config)
        found = model(**moved(inputs), past_key_values=cache, use_cache=True).logits
        # The prompt's grids are on the CPU, in its layout.
        assert not devices.reads
        prefix = PrefixCache.from_cache(cache, scratch=8)
        denoising = step(position)
        denoising |= {name: on("meta:0", denoising[name]) for name in ("latents", "timesteps")}
        first = model(**denoising, past_key_values=prefix).velocity
        second = model(**denoising, past_key_values=prefix).velocity
        assert not devices.reads
        # Which MPS does not have.
        assert torch.float64 not in devices.dtypes
    assert max_error(numbers(found), logits) <= 1e-5
    assert max_error(numbers(first), velocity) <= 1e-5
    assert torch.equal(numbers(first), numbers(second))


@pytest.mark.parametrize("device_of", [one_device, two_devices])
@torch.no_grad()
def test_a_forward_without_a_layout_reads_each_argument_once(device_of, encode):
    inputs = dict(encode(["a", "@tall", "b", "@square", "c"]))
    expected = load_model(attn_implementation="eager")(**inputs).logits
    model = placed(device_of)
    with EmulatedDevices() as devices:
        found = model(**moved(inputs), use_cache=False).logits
    assert max_error(numbers(found), expected) <= 1e-5
    # Types and grids of the images; and whether there is padding, which the library asks.
    assert sum(devices.reads.values()) <= 4, devices.reads


def test_emulated_devices_find_a_mix_and_a_read():
    with EmulatedDevices() as devices:
        first, second = (on(f"meta:{index}", torch.ones(3)) for index in (0, 1))
        assert first.double().dtype in devices.dtypes
        with pytest.raises(RuntimeError, match="on one device"):
            first + second
        with pytest.raises(RuntimeError, match="on one device"):
            first + torch.ones(3)
        assert numbers(first + second.to("meta:0")).tolist() == [2, 2, 2]
        assert not devices.reads
        for read in (lambda: first.sum().item(), first.cpu, first.nonzero, lambda: bool(first.any())):
            devices.reads.clear()
            read()
            assert devices.reads
