"""Checkpoints as long as the original one: all of its names, with its widths as holes, or narrower with gigabytes of data."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import convert_hf_to_bagel
import pytest
import repositories
import torch
from accelerate import init_empty_weights
from convert_bagel_to_hf import convert
from convert_hf_to_bagel import convert_back
from original_config import original_settings
from repositories import STATE
from streaming import Shard

from tests.conftest import CHECKPOINT, GOLDEN
from tests.conversion.conftest import CONVERSION, peak_bytes
from tests.processes import CONTEXT, become, run_script
from transformers_bagel import BagelConfig, BagelForConditionalGeneration
from transformers_bagel.stored_tensors import StoredTensor, stored_tensors


SHAPES = json.loads((GOLDEN.parent / "full_size_shapes.json").read_text(encoding="utf-8"))
# A quarter of every width but that of a head, and a few layers; the golden VAE has a quarter of the channels, too.
NARROW = {3584: 896, 512: 128, 18944: 4736, 1152: 288, 4304: 1076, 64: 16}
NUM_LAYERS = 4
DATA = torch.randn(2**21, generator=torch.Generator().manual_seed(0)).numpy().tobytes()


def header(name: str, shapes: dict[str, list[int]], dtype: torch.dtype) -> Shard:
    return Shard(name, tuple(StoredTensor(key, dtype, tuple(shape), Path(), 0, 0) for key, shape in shapes.items()))


def write_hollow(shard: Shard, folder: Path, progress: object = None) -> None:
    """A file of the right size whose tensors are a hole, which takes no space on the disk."""
    with open(folder / shard.name, "wb") as stream:
        stream.write(shard.header())
        stream.truncate(stream.tell() + shard.num_bytes)


def write_description(folder: Path, config: dict) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder)


def test_every_original_name_and_shape_converts_there_and_back(tmp_path, monkeypatch):
    source, repository, back = (tmp_path / name for name in ("source", "repository", "back"))
    write_description(source, original_settings({}, BagelConfig()))
    write_hollow(header("ema.safetensors", SHAPES["ema.safetensors"], torch.bfloat16), source)
    write_hollow(header("ae.safetensors", SHAPES["ae.safetensors"], torch.float32), source)
    for module in (repositories, convert_hf_to_bagel):
        monkeypatch.setattr(module, "write_shard", write_hollow)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": 10**12})())

    convert(str(source), repository)
    shards = sorted(repository.glob("model-*.safetensors"))
    assert 5 < len(shards) < 10 and max(shard.stat().st_size for shard in shards) < 5e9 + 1e6
    index = json.loads((repository / "model.safetensors.index.json").read_text())
    tensors = {tensor.name: tensor for shard in shards for tensor in stored_tensors(shard)}
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == SHAPES["ema.safetensors"]
    assert index["weight_map"] == {name: tensor.file.name for name, tensor in tensors.items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    with init_empty_weights():
        model = BagelForConditionalGeneration(BagelConfig.from_pretrained(repository))
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == SHAPES["parameters"]["ema.safetensors"]

    convert_back(str(repository), back)
    for name in ("ema.safetensors", "ae.safetensors"):
        before, after = (
            {tensor.name: (tensor.dtype, tensor.shape) for tensor in stored_tensors(folder / name)}
            for folder in (source, back)
        )
        assert before == after


@pytest.fixture(scope="module")
def gigabytes() -> Iterator[Path]:
    """A folder with `source`, an original checkpoint in a quarter of its widths with few layers: 1.6 GiB in float32."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        config = original_settings({}, BagelConfig())
        config["llm_config"] |= {
            "hidden_size": 896,
            "intermediate_size": 4736,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "num_hidden_layers": NUM_LAYERS,
        }
        config["llm_config"].pop("layer_types", None)
        config["vit_config"] |= {"hidden_size": 288, "intermediate_size": 1076}
        config["vae_config"]["z_channels"] = 4
        write_description(source, config)
        shutil.copy(CHECKPOINT / "ae.safetensors", source)
        shapes = {
            name: [NARROW.get(side, side) for side in shape]
            for name, shape in SHAPES["ema.safetensors"].items()
            if not (layer := re.match(r"language_model\.model\.layers\.(\d+)\.", name)) or int(layer[1]) < NUM_LAYERS
        }
        shard = header("ema.safetensors", shapes, torch.float32)
        with open(source / shard.name, "wb") as stream:
            stream.write(shard.header())
            missing = shard.num_bytes
            while missing:
                missing -= stream.write(DATA[:missing])
        assert shard.num_bytes > 1.5 * 2**30
        yield Path(name)


@pytest.mark.slow
def test_gigabytes_convert_in_bounded_memory_and_go_on_after_a_kill(gigabytes):
    source, whole, broken = (gigabytes / name for name in ("source", "whole", "broken"))
    options = ["--dtype", "bfloat16", "--max-shard-size", "300MB"]
    peak = peak_bytes("convert_bagel_to_hf", str(source), str(whole), *options, "--verify")
    shards = list(whole.glob("model-*.safetensors"))
    largest = max(file.stat().st_size for file in shards)
    print(f"peak {peak / 2**20:.0f} MiB, largest shard {largest / 2**20:.0f} MiB")
    assert peak < largest + 2**28

    # At any byte, the first and the last ones included.
    moment = random.randrange(sum(file.stat().st_size for file in shards))
    print(f"killed at byte {moment}")
    script, command = CONVERSION / "convert_bagel_to_hf.py", (str(source), str(broken), *options)
    process = CONTEXT.Process(target=become, args=(script, command, {}, gigabytes / "said"), daemon=True)
    process.start()
    while sum(file.stat().st_size for file in broken.glob("model-*")) < moment:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    finished = {file.name: file.stat() for file in broken.glob("model-*.safetensors")}
    process.kill()
    process.join()
    # After the last byte there is a moment in which it is done.
    was_done = (broken / "model_index.json").exists() and not (broken / STATE).exists()
    if not was_done:
        run_script(script, *command, "--verify")
    for name, before in finished.items():
        after = (broken / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for file in whole.rglob("*.safetensors"):
        assert subprocess.run(["cmp", file, broken / file.relative_to(whole)]).returncode == 0
    assert not list(broken.glob("*.unfinished"))
