"""The scripts of conversion/, which are no package, and the golden checkpoint as they write it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import CHECKPOINT


CONVERSION = Path(__file__).parents[2] / "conversion"

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


# Runs a script's command and prints its peak memory in kilobytes: its own, which begins with the program, unlike that of
# `resource`, which begins with its parent's.
MEASURED = """
import importlib, sys
sys.path.insert(0, sys.argv.pop(1))
assert importlib.import_module(sys.argv.pop(1)).main(sys.argv[1:]) == 0
print(*[line for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


def peak_bytes(script: str, *arguments: str) -> int:
    """Peak memory of a command of conversion/ in a process of its own."""
    if sys.platform != "linux":
        pytest.skip("memory is read from /proc")
    command = [sys.executable, "-c", MEASURED, str(CONVERSION), script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout.split("VmHWM:")[1].split()[0])


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """The golden checkpoint in several shards. Tests that change it copy it."""
    from convert_bagel_to_hf import convert

    folder = tmp_path_factory.mktemp("converted") / "repository"
    convert(str(CHECKPOINT), folder, max_shard_size="500KB", verify=True)
    return folder
