"""Offloading draws what the device draws: by model, by layer, by groups with a stream and without, maps over device and CPU."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import max_error
from tests.gpu.common import BOUND, GPU, drawn, edited, load, model_of, needs_accelerator, needs_cuda


@pytest.fixture(scope="module")
def expected(on_gpu) -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(on_gpu), edited(on_gpu)


@pytest.fixture
def check(expected, within):
    def run(pipe) -> None:
        pairs = [(draw(pipe), image) for _ in range(2) for draw, image in zip((drawn, edited), expected, strict=True)]
        within(max(max_error(*pair) for pair in pairs), BOUND)

    return run


@needs_accelerator
def test_by_model(check):
    pipe = load()
    pipe.enable_model_cpu_offload(device=GPU)
    check(pipe)
    assert pipe.transformer.device.type == "cpu"


@needs_accelerator
def test_layer_by_layer(check):
    pipe = load()
    pipe.enable_sequential_cpu_offload(device=GPU)
    check(pipe)


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=needs_cuda)])
@pytest.mark.parametrize("blocks", [None, 1, 2])
def test_by_groups(blocks, stream, check):
    pipe = load()
    how = {"offload_type": "leaf_level"} if blocks is None else {"num_blocks_per_group": blocks}
    if stream and blocks == 2:
        how["num_blocks_per_group"] = 1
        how["record_stream"] = True
    pipe.enable_group_offload(GPU, use_stream=stream, **how)
    check(pipe)


@pytest.mark.skipif(GPU.type == "mps", reason="MPS has no float8")
def test_weights_in_float8_while_they_rest(expected):
    pipe = load().to(GPU)
    pipe.enable_layerwise_casting()
    assert 0 < (drawn(pipe) - expected[0]).abs().mean() <= 0.1


@needs_cuda
def test_a_map_over_device_and_cpu(check):
    """As `device_map="auto"` gives it when the model does not fit."""
    devices = {"": 0, "model.language_model.layers.1": "cpu", "lm_head": "cpu"}
    pipe = load(transformer=model_of(device_map=devices))
    pipe.vae.to(GPU)
    check(pipe)


@needs_cuda
def test_an_automatic_map_with_a_bound(check, tmp_path):
    model = model_of(device_map="auto", max_memory={0: 700_000, "cpu": 10**9}, offload_folder=tmp_path)
    assert len({str(device) for device in model.hf_device_map.values()}) > 1
    pipe = load(transformer=model)
    pipe.vae.to(GPU)
    check(pipe)


def test_a_map_to_the_device(check):
    check(load(device_map=str(GPU)))
