# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The published repository on a small machine: one file of 29.2 GB is loaded and used where less can be addressed than that.

    python benchmarks/full_size.py --limit 16 --json full_size.json "4 bits" "on the disk"

The file has the published names and shapes, and holes in the place of numbers: it takes no space, and its weights take what
others would. Each way runs in a process of its own whose address space is limited (RLIMIT_AS), so that what it takes with
all imports is within the limit, or it fails. Then it answers, or draws a step of 256 pixels; both are of no meaning.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from refusals import need_output
from transformers import BitsAndBytesConfig, TorchAoConfig

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.stored_tensors import DTYPES


GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
GB = 10**9


def int8() -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}


def nf4() -> dict[str, Any]:
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    }


def on_the_disk(folder: str = "offloaded") -> dict[str, Any]:
    return {"device_map": "auto", "max_memory": {"cpu": "4GB"}, "offload_folder": folder}


# Whether it draws, and arguments of `from_pretrained`.
WAYS: dict[str, tuple[bool, Callable[[], dict[str, Any]]]] = {
    "bfloat16, understanding only": (False, lambda: {"visual_gen": False}),
    "int8": (True, int8),
    "int8, understanding only": (False, lambda: {"visual_gen": False} | int8()),
    "4 bits": (True, nf4),
    "4 bits, understanding only": (False, lambda: {"visual_gen": False} | nf4()),
    "on the disk": (True, on_the_disk),
    "on the disk, understanding only": (False, lambda: {"visual_gen": False} | on_the_disk()),
    "float32 on the disk, understanding only": (
        False,
        lambda: {"visual_gen": False, "dtype": torch.float32} | on_the_disk(),
    ),
}


def write_hollow(file: Path, shapes: dict[str, list[int]], dtype: str) -> None:
    """A safetensors file whose tensors are a hole."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with open(file, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(stream.tell() + end)


def write_repository(folder: Path) -> None:
    """The published layout, with the golden tokenizer."""
    shapes = json.loads((GOLDEN / "full_size_shapes.json").read_text(encoding="utf-8"))
    write_hollow(folder / "ema.safetensors", shapes["ema.safetensors"], "BF16")
    write_hollow(folder / "ae.safetensors", shapes["ae.safetensors"], "F32")
    checkpoint = GOLDEN / "a" / "checkpoint"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder)
    config = BagelConfig().to_dict()
    special = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(special | {"llm_config": config["text_config"], "vit_config": config["vision_config"]})
    )


def memory(line: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(line)[1].split()[0])


def measure(name: str, folder: str) -> dict[str, Any]:
    """One way, in this process."""
    # Otherwise glibc keeps what is freed (M_MMAP_THRESHOLD).
    ctypes.CDLL(None).mallopt(-3, 2**20)
    draws, arguments = WAYS[name]
    imports, start = memory("VmRSS:"), time.perf_counter()
    loader = BagelPipeline if draws else BagelForConditionalGeneration
    loaded = loader.from_pretrained(folder, **({"dtype": torch.bfloat16} | arguments()))
    row = {"name": name, "load_seconds": time.perf_counter() - start, "load_peak": memory("VmHWM:")}
    row |= {"kept": memory("VmRSS:") - imports, "load_addresses": memory("VmPeak:")}
    print("loaded:", json.dumps(row), file=sys.stderr, flush=True)
    start = time.perf_counter()
    if draws:
        loaded("a circle", height=256, width=256, num_inference_steps=1, guidance_scale=1.0, output_type="pt")
    else:
        processor = BagelProcessor.from_pretrained(folder)
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": "a circle?"}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        loaded.generate(**inputs, max_new_tokens=1)
    return row | {"use_seconds": time.perf_counter() - start, "peak": memory("VmHWM:"), "addresses": memory("VmPeak:")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", choices=[*WAYS, []], help="default: all")
    parser.add_argument("--limit", type=float, help="GB that a process may address")
    parser.add_argument("--json", type=Path, help="file of the rows")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print("row:", json.dumps(measure(options.ways[0], options.measure)))
        return
    need_output(parser, "json", options.json)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_repository(Path(folder))
        for way in options.ways or WAYS:
            rows.append(measured_in_a_process(way, folder, options.limit))
            shutil.rmtree(Path(folder, "offloaded"), ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def measured_in_a_process(way: str, folder: str, limit: float | None) -> dict[str, Any]:
    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (int(limit * GB),) * 2)

    command = [sys.executable, __file__, way, "--measure", folder]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, preexec_fn=limited)
    if done.returncode:
        print(f"{way}: failed within {limit} GB", file=sys.stderr)
        return {"name": way, "limit": limit, "failed": done.returncode}
    row = json.loads(done.stdout.split("row: ")[1]) | {"limit": limit}
    sizes = (f"{row[key] / GB:.1f}" for key in ("kept", "load_peak", "peak", "addresses"))
    print(
        "|",
        way,
        "|",
        " | ".join([*sizes, f"{row['load_seconds']:.0f} s", f"{row['use_seconds']:.0f} s"]),
        "|",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
