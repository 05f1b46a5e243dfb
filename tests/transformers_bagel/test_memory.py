"""Peak memory of loading, each in a process of its own, and what `device_map` says of offloading."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from tests.conftest import load_model
from tests.peak_memory import OVERHEAD, empty_model, peaks_of, write_checkpoint
from transformers_bagel import BagelForConditionalGeneration


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

QUANTIZATIONS = {
    "torchao_int8": "TorchAoConfig(Int8WeightOnlyConfig())",
    "bitsandbytes_int8": "BitsAndBytesConfig(load_in_8bit=True)",
    "bitsandbytes_nf4": "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')",
}
# Bytes a weight: half a byte, and four of scale for each block of 64.
SIZES = {"torchao_int8": 1, "bitsandbytes_int8": 1, "bitsandbytes_nf4": 0.5 + 4 / 64}
# File and arguments of each load.
LOADS = {
    "F32": ("F32", ""),
    "BF16": ("BF16", ""),
    "visual_gen": ("F32", "visual_gen=False"),
    "visual_und": ("F32", "visual_und=False"),
} | {name: ("F32", f"quantization_config={code}") for name, code in QUANTIZATIONS.items()}


def num_bytes(model: BagelForConditionalGeneration, size_of: Callable[[str], float]) -> float:
    return sum(size_of(name) * tensor.numel() for name, tensor in model.state_dict().items())


def of_bfloat16(name: str) -> float:
    return 2


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, int]:
    """Peak of each load, in bytes, above what the process had before."""
    folders = {
        name: str(write_checkpoint(tmp_path_factory.mktemp(name), name, dtype))
        for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16))
    }
    return peaks_of(
        {name: ("BagelForConditionalGeneration", folders[stored], code) for name, (stored, code) in LOADS.items()}
    )


@needs_proc
@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_loading_takes_the_weights_and_no_second_copy(stored, peaks):
    weights = num_bytes(empty_model(), of_bfloat16)
    assert weights > 7 * OVERHEAD
    assert peaks[stored] < weights + OVERHEAD


@needs_proc
@pytest.mark.parametrize("left_out", ["visual_gen", "visual_und"])
def test_a_model_without_modules_takes_its_own_weights(left_out, peaks):
    weights = num_bytes(empty_model(**{left_out: False}), of_bfloat16)
    assert weights - OVERHEAD < peaks[left_out] < weights + OVERHEAD
    assert left_out == "visual_und" or weights < 0.55 * num_bytes(empty_model(), of_bfloat16)


@needs_proc
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantizing_takes_the_quantized_weights_and_one_layer(quantization, peaks):
    size = SIZES[quantization]
    weights = num_bytes(empty_model(), lambda name: size if ".layers." in name and "_proj" in name else 2)
    # A layer's float32 and what it is computed with.
    one_layer = 4 * 4 * 1024 * 4096
    assert peaks[quantization] < weights + one_layer + OVERHEAD < num_bytes(empty_model(), of_bfloat16)


def test_a_device_map_that_offloads_says_so_once(tmp_path, caplog):
    device_map = {"model": "cpu", "lm_head": "disk"}
    load_model(device_map=device_map, offload_folder=str(tmp_path))
    assert [record.levelname for record in caplog.records if "offloaded to the" in record.message] == ["WARNING"]
    caplog.clear()
    load_model(device_map="cpu")
    assert not [record for record in caplog.records if "offload" in record.message]
