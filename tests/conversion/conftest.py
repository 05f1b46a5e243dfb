"""The scripts of conversion/, which are no package, and the golden checkpoint as they write it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import CHECKPOINT
from tests.processes import run_script


CONVERSION = Path(__file__).parents[2] / "conversion"
COMMAND = Path(__file__).with_name("command.py")

sys.path.insert(0, str(CONVERSION))


def wide_checkpoint(folder: Path, repeats: int) -> None:
    """The golden checkpoint with a vocabulary that is longer by a factor, and with it the file."""
    folder.mkdir()
    for file in CHECKPOINT.iterdir():
        if file.suffix == ".json" or file.name in ("merges.txt", "ae.safetensors"):
            shutil.copy(file, folder)
    (folder / "model.safetensors.index.json").unlink()
    weights = load_file(CHECKPOINT / "ema.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = weights[name].repeat(repeats, 1)
    save_file(weights, folder / "ema.safetensors")


def peak_bytes(script: str, *arguments: str) -> int:
    """What the peak memory of a command of conversion/ adds to that of the libraries, in a process of its own."""
    if sys.platform != "linux":
        pytest.skip("memory is read from /proc")
    printed = run_script(COMMAND, "-1", script, *arguments)
    return int(printed.split("peak: ")[1].split()[0])


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """The golden checkpoint in several shards. Tests that change it copy it."""
    from convert_bagel_to_hf import convert

    folder = tmp_path_factory.mktemp("converted") / "repository"
    convert(str(CHECKPOINT), folder, max_shard_size="500KB", verify=True)
    return folder
