"""Peak memory of loading, each in a process of its own, and what `device_map` says of offloading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import CHECKPOINT, load_model
from transformers_bagel import BagelConfig, BagelForConditionalGeneration


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

# What threads, code that is loaded late and half-used pages of an allocator take.
OVERHEAD = 96 * 2**20
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
MEASURED = """
import gc
import json
import sys
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from torchao.quantization import Int8WeightOnlyConfig

from transformers_bagel import BagelForConditionalGeneration


def memory(line):
    return 1024 * int(Path("/proc/self/status").read_text().split(line)[1].split()[0])


peaks = {}
for name, (folder, arguments) in json.loads(sys.argv[1]).items():
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS:")
    model = BagelForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, **eval(f"dict({arguments})"))
    peaks[name] = memory("VmHWM:") - before
    del model
print(json.dumps(peaks))
"""


def empty_model(**halves: bool) -> BagelForConditionalGeneration:
    config = BagelConfig.from_pretrained(CHECKPOINT).to_dict()
    config["text_config"] |= {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 4096,
    }
    config["text_config"].pop("layer_types", None)
    with torch.device("meta"):
        return BagelForConditionalGeneration(BagelConfig.from_dict(config | halves))


def num_bytes(model: BagelForConditionalGeneration, size_of: Callable[[str], float]) -> float:
    return sum(size_of(name) * tensor.numel() for name, tensor in model.state_dict().items())


def of_bfloat16(name: str) -> float:
    return 2


def write_checkpoint(folder: Path, name: str, dtype: torch.dtype) -> Path:
    """Weights that are holes in a file, and take no room on the disk."""
    model = empty_model()
    model.config.save_pretrained(folder)
    entries: dict[str, dict] = {}
    end = 0
    for key, tensor in model.state_dict().items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        entries[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(stream.tell() + end)
    return folder


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, int]:
    """Peak of each load, in bytes, above what the process had before."""
    folders = {
        name: str(write_checkpoint(tmp_path_factory.mktemp(name), name, dtype))
        for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16))
    }
    loads = {name: (folders[stored], arguments) for name, (stored, arguments) in LOADS.items()}
    # Otherwise glibc keeps what bitsandbytes and torchao free.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", MEASURED, json.dumps(loads)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_loading_takes_the_weights_and_no_second_copy(stored, peaks):
    weights = num_bytes(empty_model(), of_bfloat16)
    assert weights > 7 * OVERHEAD
    assert peaks[stored] < weights + OVERHEAD


@pytest.mark.parametrize("half", ["visual_gen", "visual_und"])
def test_a_half_takes_its_own_weights(half, peaks):
    weights = num_bytes(empty_model(**{half: False}), of_bfloat16)
    assert weights - OVERHEAD < peaks[half] < weights + OVERHEAD
    assert half == "visual_und" or weights < 0.55 * num_bytes(empty_model(), of_bfloat16)


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
