"""Where conversions write to is looked at before there is any work: links are followed, and what cannot be is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from build_bagel import main as build
from convert_bagel_to_hf import main as convert
from convert_hf_to_bagel import main as convert_back
from convert_lora import main as convert_lora
from merge_lora import main as merge_lora

from tests.conftest import CHECKPOINT
from tests.diffusers_bagel.test_lora import save_peft


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> str:
    return save_peft(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def commands(lora, repository) -> dict[str, Callable[[str], int]]:
    parts = ["--language-model", "a", "--vision-model", "b", "--vae", "c"]
    return {
        "convert": lambda dst: convert([str(CHECKPOINT), dst]),
        "convert back": lambda dst: convert_back([str(repository), dst]),
        "merge": lambda dst: merge_lora([str(repository), dst, "--loras", lora]),
        "convert lora": lambda dst: convert_lora([lora, dst, "--to", "diffusers"]),
        "build": lambda dst: build([dst, *parts]),
    }


NAMES = ["convert", "convert back", "merge", "convert lora", "build"]


def places(folder: Path) -> dict[str, tuple[Path, str]]:
    """Places that are refused, and what the error says."""
    (folder / "file").write_text("mine")
    (folder / "full").mkdir()
    (folder / "full" / "mine").write_text("mine")
    (folder / "nowhere").symlink_to(folder / "gone")
    (folder / "to a file").symlink_to(folder / "file")
    (folder / "to a full one").symlink_to(folder / "full")
    return {
        "a file": (folder / "file", "is a file"),
        "below a file": (folder / "file" / "new" / "one", "is a file"),
        "a dangling link": (folder / "nowhere", "is a link to"),
        "below a dangling link": (folder / "nowhere" / "new", "is a link to"),
        "a link to a file": (folder / "to a file", "is a file"),
        "a full folder": (folder / "full", "is not empty"),
        "a link to a full folder": (folder / "to a full one", "is not empty"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_places_that_cannot_be_written_are_refused_before_any_work(name, commands, tmp_path, capsys, monkeypatch):
    refused = places(tmp_path)
    for module in ("merge_lora", "convert_hf_to_bagel", "convert_bagel_to_hf", "build_bagel"):
        monkeypatch.setattr(f"{module}.opened", lambda *args, **kwargs: pytest.fail("it began to work"))
    for what, (place, message) in refused.items():
        assert commands[name](str(place)) == 2, what
        assert message in capsys.readouterr().err, what
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert commands[name](str(tmp_path / "new" / "one")) == 2
    assert "nothing can be written" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {
        *("file", "full", "nowhere", "to a file", "to a full one"),
    }
    assert (tmp_path / "full" / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", NAMES[:4])
def test_links_to_empty_folders_and_the_home_are_followed(name, commands, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert commands[name](str(tmp_path / "link")) == 0
    assert (tmp_path / "link").is_symlink() and any((tmp_path / "empty").iterdir())
    if name == "convert lora":
        monkeypatch.setenv("HOME", str(tmp_path))
        assert commands[name]("~/mine/lora") == 0
        assert any((tmp_path / "mine" / "lora").iterdir())


def test_a_folder_that_cannot_be_replaced_is_refused(commands, tmp_path, capsys, monkeypatch):
    """Such as a volume of a container."""
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    assert commands["merge"](str(tmp_path)) == 2
    assert "Name a new folder in it" in capsys.readouterr().err
    assert commands["convert"](str(tmp_path)) == 0


def test_a_conversion_goes_on_behind_a_link(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("repositories.write_shard", killed)
        convert([str(CHECKPOINT), str(tmp_path / "link")])
    assert convert([str(CHECKPOINT), str(tmp_path / "link")]) == 0
    shutil.rmtree(tmp_path / "empty")
