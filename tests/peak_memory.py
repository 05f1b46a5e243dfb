"""Checkpoints of a gigabyte, and the peak memory of loading them in a process of its own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from tests.conftest import CHECKPOINT
from tests.processes import run_script
from transformers_bagel import BagelConfig, BagelForConditionalGeneration


# What threads, code that is loaded late and half-used pages of an allocator take.
OVERHEAD = 64 * 2**20

# Runs in a process of its own, see `peaks_of`.
MEASURED = """
import ctypes
import gc
import json
import resource
import sys
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from torchao.quantization import Int8WeightOnlyConfig

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelForConditionalGeneration


def memory(line):
    return 1024 * int(Path("/proc/self/status").read_text().split(line)[1].split()[0])


# Otherwise glibc keeps what bitsandbytes and torchao free, and each thread reserves addresses: -3 is M_MMAP_THRESHOLD, and
# -8 is M_ARENA_MAX.
assert ctypes.CDLL(None).mallopt(-3, 2**20) and ctypes.CDLL(None).mallopt(-8, 1)
# The first load also brings in the code that loads: 40 MB here, and 65 seen elsewhere.
for loader in {loader for loader, *_ in json.loads(sys.argv[1]).values()}:
    eval(loader).from_pretrained(sys.argv[2])
peaks = {}
for name, (loader, folder, arguments, limit) in json.loads(sys.argv[1]).items():
    gc.collect()
    addresses = -1 if limit is None else memory("VmSize:") + limit
    resource.setrlimit(resource.RLIMIT_AS, (addresses, -1))
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS:")
    arguments = {"dtype": torch.bfloat16} | eval(f"dict({arguments})")
    loaded = eval(loader).from_pretrained(folder, **arguments)
    peaks[name] = memory("VmHWM:") - before
    del loaded
print("peaks:", json.dumps(peaks))
"""


def empty_model(**modules: bool) -> BagelForConditionalGeneration:
    config = BagelConfig.from_pretrained(CHECKPOINT).to_dict()
    config["text_config"] |= {
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 4096,
    }
    config["text_config"].pop("layer_types", None)
    with torch.device("meta"):
        return BagelForConditionalGeneration(BagelConfig.from_dict(config | modules))


def write_checkpoint(folder: Path, name: str, dtype: torch.dtype) -> Path:
    model = empty_model()
    model.config.save_pretrained(folder)
    write_holes(folder / "model.safetensors", model.state_dict(), name, dtype)
    return folder


def write_holes(file: Path, tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> None:
    """Weights of these shapes that are holes in a file, and take no space on the disk."""
    entries: dict[str, dict] = {}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        entries[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with open(file, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(stream.tell() + end)


def peaks_of(loads: dict[str, tuple[str, str, str]], limits: dict[str, int] | None = None) -> dict[str, int]:
    """Peak of each load in bytes, above what the process had before. A load is a class, a folder and its arguments; its limit
    is how many bytes of addresses the process may have beside those that it had."""
    loads = {name: (*load, (limits or {}).get(name)) for name, load in loads.items()}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "measured.py"
        script.write_text(MEASURED, encoding="utf-8")
        printed = run_script(script, json.dumps(loads), str(CHECKPOINT))
    return json.loads(printed.split("peaks: ")[1].splitlines()[0])
