# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Ways to load a checkpoint, what each needs, and the best that fits into the memory of this machine."""

from __future__ import annotations

import copy
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import parse_safetensors_file_metadata
from huggingface_hub.constants import HF_HOME

from transformers_bagel import BagelConfig, BagelForConditionalGeneration
from transformers_bagel.files import find_cached, find_file, hub_arguments, in_subfolder
from transformers_bagel.packed import open_weights
from transformers_bagel.products import told_products
from transformers_bagel.quantization import undivided_modules
from transformers_bagel.weights import find_weights

from .files import CommandError


GB = 10**9
# Beside the weights, for what is computed: the VAE and a picture of 1024 pixels, or the keys and values of a conversation.
FOR_DRAWING, FOR_SPEECH = 3 * GB, 1 * GB
# Of weights that rest on the disk, this much may be in memory.
RESIDENT = 2 * GB
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CONTROL_GROUP = Path("/sys/fs/cgroup")
# Its limit, what it uses, and of what: of version 2, and of version 1.
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


@dataclass(frozen=True)
class Way:
    """
    How a checkpoint is loaded.

    Attributes:
        name (`str`): As the user reads it.
        dtype (`torch.dtype`): Of all that is not rounded.
        layer_bytes (`float`, *optional*): Of a weight in the layers that are rounded.
        on_disk (`bool`): Whether most weights rest on the disk.
    """

    name: str
    dtype: torch.dtype = torch.bfloat16
    layer_bytes: float | None = None
    on_disk: bool = False


FULL = {name: Way(name, getattr(torch, name)) for name in ("float32", "bfloat16", "float16")}
INT8 = Way("int8", layer_bytes=1)
# Half a byte, and four of scale for each block of 64.
FOUR_BITS = Way("4 bits", layer_bytes=0.5 + 4 / 64)
ON_DISK = Way("bfloat16, most of it on the disk", on_disk=True)


def possible_ways(device: torch.device) -> list[Way]:
    """With what is installed, from the best to the smallest."""
    ways = [FULL["bfloat16"]] if device.type == "cuda" else [FULL["float32"], FULL["bfloat16"]]
    ways += [INT8] * (find_spec("torchao") is not None) + [FOUR_BITS] * (find_spec("bitsandbytes") is not None)
    return [*ways, ON_DISK]


def needed_bytes(config: BagelConfig, way: Way, draws: bool) -> int:
    """What loading and using takes, by the shapes of the weights."""
    config = copy.deepcopy(config)
    config.visual_gen = config.visual_gen and draws
    with torch.device("meta"):
        model = BagelForConditionalGeneration(config)
    kept = undivided_modules(model, 32, 64) if way is FOUR_BITS else []

    def bytes_of(name: str) -> float:
        module, _, parameter = name.rpartition(".")
        is_rounded = ".layers." in name and "norm" not in name and parameter == "weight"
        return (
            way.layer_bytes if way.layer_bytes and is_rounded and re.escape(module) not in kept else way.dtype.itemsize
        )

    weights = sum(bytes_of(name) * tensor.numel() for name, tensor in model.state_dict().items())
    # Small models draw small pictures.
    extra = min(FOR_DRAWING if draws else FOR_SPEECH, weights)
    return int(min(weights, RESIDENT) if way.on_disk else weights) + int(extra)


def free_bytes(device: torch.device) -> int:
    """Memory that a process may still take: of the device, or of the system within the limits of this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [psutil.virtual_memory().available, *_free_addresses()]
    for limit, usage, parts in ([CONTROL_GROUP / name for name in names] for names in _LIMITS):
        if limit.exists() and usage.exists() and (most := limit.read_text().strip()).isdigit():
            free.append(int(most) - int(usage.read_text()) + _reclaimable(parts))
    return max(min(free), 0)


def _free_addresses() -> list[int]:
    """What a limit of this process leaves, if there is one."""
    try:
        import resource
    except ImportError:
        # On Windows.
        return []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return [] if limit == resource.RLIM_INFINITY else [limit - psutil.Process().memory_info().vms]


def _reclaimable(file: Path) -> int:
    """Of what a control group uses, the files that the system keeps in memory until it is wanted."""
    counts = dict(line.split() for line in file.read_text().splitlines()) if file.exists() else {}
    # Version 1 counts those of groups below under another name.
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def are_packed(name: str, subfolder: dict[str, str], config: BagelConfig) -> bool:
    """
    Whether the weights of a folder or a Hub repository are in a GGUF or in FP8, from which nothing is rounded again.

    Args:
        name (`str`), subfolder (`dict`): As arguments of `from_pretrained`.
        config ([`BagelConfig`])
    """
    hub = hub_arguments(name, subfolder)
    weights = find_weights(name, hub, stated=getattr(config, "transformers_weights", None), strict=False)
    if weights is None or weights.name.endswith(".gguf"):
        return weights is not None
    first = weights.files[0]
    file = find_file(name, first, **hub) if os.path.isdir(name) else find_cached(name, first, hub)
    if isinstance(file, str):
        return any(tensor.dtype in _FP8 for tensor in open_weights([file]).values())
    metadata = parse_safetensors_file_metadata(name, in_subfolder(first, hub), revision=hub.get("revision"))
    return any(dtype.startswith("F8_") for dtype in metadata.parameter_count)


def choose(
    config: BagelConfig,
    device: torch.device,
    draws: bool,
    dtype: str | None,
    low_memory: bool,
    packed: bool = False,
) -> Way:
    """
    The best way that fits, unless the user has named one. What was chosen is said, and whether it will do.

    Args:
        config ([`BagelConfig`])
        device (`torch.device`)
        draws (`bool`): Or answers only, for which half of the weights is left out.
        dtype (`str`, *optional*), low_memory (`bool`): What the user asked for.
        packed (`bool`, *optional*, defaults to `False`): See [`are_packed`].
    """
    free = free_bytes(device)
    ways = [ON_DISK] if low_memory else [FULL[dtype]] if dtype else possible_ways(device)
    ways = [way for way in ways if way.layer_bytes is None or not packed]
    if any(getattr(config, name, None) is not None for name in ("quantization_config", "dfloat11_config")):
        _say(
            "the weights are quantised already, and loaded as they are"
            + (": --low-memory changes nothing" if low_memory else "")
        )
        return FULL[dtype or "bfloat16"]
    needs = [needed_bytes(config, way, draws) for way in ways]
    chosen = next((index for index, need in enumerate(needs) if need <= free), len(ways) - 1)
    text = f"loading in {ways[chosen].name}: about {size(needs[chosen])} of {size(free)} that are free"
    if chosen:
        passed = (f"{way.name} would need {size(need)}" for way, need in zip(ways[:chosen], needs, strict=False))
        text += f" ({', '.join(passed)})"
    if needs[chosen] > free:
        text += ". That is more than there is: it will be slow, or fail." + (
            " --low-memory needs less." if dtype else ""
        )
    elif ways[chosen].dtype == torch.float32 and device.type == "cpu":
        text += f"; {told_products(config)}"
    _say(text)
    return ways[chosen]


@contextmanager
def loading_arguments(way: Way, config: BagelConfig, draws: bool, device: torch.device) -> Iterator[dict[str, Any]]:
    """
    Arguments of `from_pretrained`, for as long as what is loaded is used.

    Raises:
        CommandError: if there is too little space on the disk.
    """
    arguments: dict[str, Any] = {"dtype": way.dtype}
    if way is INT8:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        arguments["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    if way is FOUR_BITS:
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=way.dtype
        )
    if not way.on_disk:
        yield arguments
        return
    Path(HF_HOME).mkdir(parents=True, exist_ok=True)
    weights, space = needed_bytes(config, FULL["bfloat16"], draws), shutil.disk_usage(HF_HOME).free
    if weights > space:
        raise CommandError(
            f"the weights take {size(weights)} in '{HF_HOME}', where {size(space)} are free: set HF_HOME to a larger disk."
        )
    max_memory: dict[Any, int] = {"cpu": RESIDENT}
    if device.type == "cuda":
        max_memory[device.index or 0] = max(free_bytes(device) - FOR_DRAWING, 0)
    with tempfile.TemporaryDirectory(prefix="bagel-offloaded-", dir=HF_HOME) as folder:
        yield arguments | {"device_map": "auto", "max_memory": max_memory, "offload_folder": folder}


def size(count: float) -> str:
    """Bytes as one reads them."""
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 10**6:.1f} MB"


def _say(text: str) -> None:
    print(text, file=sys.stderr)
