"""Conversion in pieces: memory that does not grow, files that are whole, runs that go on, results that are read again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import convert_bagel_to_hf
import pytest
import streaming
import torch
from convert_bagel_to_hf import STATE, convert, main
from safetensors.torch import load_file, save_file

from tests.conftest import CHECKPOINT
from tests.conversion.conftest import CONVERSION


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("model-*.safetensors")}


def killed_after(num_shards: int, monkeypatch, folder: Path) -> None:
    """A run that ends in the middle of a file."""
    write, pieces = convert_bagel_to_hf.write_shard, streaming.pieces
    written: list[str] = []

    def cut_off(tensor, dtype):
        yield next(pieces(tensor, dtype))[:10]
        raise KeyboardInterrupt

    def counted(shard, *args):
        if len(written) == num_shards:
            monkeypatch.setattr(streaming, "pieces", cut_off)
        written.append(shard.name)
        write(shard, *args)

    monkeypatch.setattr(convert_bagel_to_hf, "write_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        convert(str(CHECKPOINT), folder, max_shard_size="500KB")
    monkeypatch.undo()


def test_a_killed_run_goes_on_with_the_file_it_was_at(repository, tmp_path, monkeypatch):
    folder = tmp_path / "repository"
    killed_after(1, monkeypatch, folder)
    (finished,) = shards(folder)
    assert (folder / "model-00002-of-00003.safetensors.unfinished").stat().st_size > 0
    before = (folder / finished).stat()
    convert(str(CHECKPOINT), folder, max_shard_size="500KB")
    after = (folder / finished).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert shards(folder) == shards(repository)
    assert not list(folder.glob("*.unfinished")) and not (folder / STATE).exists()


def test_another_run_does_not_go_on_with_its_files(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "repository"
    killed_after(1, monkeypatch, folder)
    assert main([str(CHECKPOINT), str(folder), "--max-shard-size", "500KB", "--dtype", "bfloat16"]) == 2
    assert "another conversion" in capsys.readouterr().err


def test_a_folder_that_is_taken_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main([str(CHECKPOINT), str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_room_on_the_disk_is_looked_for_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": 1000})())
    assert main([str(CHECKPOINT), str(tmp_path / "repository")]) == 2
    assert "GB free" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()


def test_verification_finds_a_changed_byte(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "repository"
    write = convert_bagel_to_hf.write_shard

    def damaged(shard, *args):
        write(shard, *args)
        with open(folder / shard.name, "r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x55")

    monkeypatch.setattr(convert_bagel_to_hf, "write_shard", damaged)
    assert main([str(CHECKPOINT), str(folder), "--verify"]) == 2
    assert "is not what" in capsys.readouterr().err


def wide_checkpoint(folder: Path, repeats: int) -> None:
    """The golden checkpoint with a vocabulary so long that its file has gigabytes."""
    folder.mkdir()
    for file in CHECKPOINT.iterdir():
        if file.suffix == ".json" or file.name in ("merges.txt", "ae.safetensors"):
            shutil.copy(file, folder)
    (folder / "model.safetensors.index.json").unlink()
    weights = load_file(CHECKPOINT / "ema.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = weights[name].repeat(repeats, 1)
    save_file(weights, folder / "ema.safetensors")


# Runs a command and prints its peak memory in bytes, the pages of its files included.
MEASURED = """
import resource, sys
sys.path.insert(0, sys.argv.pop(1))
from convert_bagel_to_hf import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(sys.argv[1:]) == 0
print("peak", 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    wide_checkpoint(tmp_path / "wide", repeats=3000)
    size = (tmp_path / "wide" / "ema.safetensors").stat().st_size
    assert size > 600e6
    arguments = [str(tmp_path / "wide"), str(tmp_path / "repository"), "--max-shard-size", "100MB", "--verify"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(CONVERSION), *arguments, "--dtype", "bfloat16"],
        capture_output=True,
        text=True,
        check=True,
    )
    peak = int(done.stdout.rsplit("peak ", 1)[1])
    assert peak < 350e6, f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB"


def test_a_run_killed_at_any_moment_goes_on(tmp_path):
    wide_checkpoint(tmp_path / "wide", repeats=1000)
    folder = tmp_path / "repository"
    command = [sys.executable, str(CONVERSION / "convert_bagel_to_hf.py"), str(tmp_path / "wide"), str(folder)]
    command += ["--max-shard-size", "20MB"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not shards(folder):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.random() / 10)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--verify"], check=True, capture_output=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    written = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    source = load_file(tmp_path / "wide" / "ema.safetensors")
    assert all(torch.equal(written[file][name], source[name]) for name, file in index["weight_map"].items())
