"""Conversion in pieces: memory that does not grow, files that are whole, runs that go on, results that are read again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import convert_bagel_to_hf
import pytest
import streaming
from convert_bagel_to_hf import STATE, convert, main

from tests.conftest import CHECKPOINT


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
