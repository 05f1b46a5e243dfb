"""What a checkpoint from anywhere might try, and what is missing in one: an error that names it, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from convert_bagel_to_hf import main
from safe_files import stored_tensors
from safetensors.torch import load_file, save_file

from tests.conftest import CHECKPOINT


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the golden checkpoint to spoil."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))


def said(source: Path, capsys, *arguments: str) -> str:
    """The error of a conversion that must fail before it writes."""
    destination = source.parent / "repository"
    assert main([str(source), str(destination), *arguments]) == 2
    assert not destination.exists()
    return capsys.readouterr().err


def with_header(source: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (source / "ema.safetensors").write_bytes(size.to_bytes(8, "little") + text + data)


def entry(shape: list, offsets: list, dtype: str = "F32") -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        pytest.param(b"{}", b"", 2**62, "header of", id="header longer than the file"),
        pytest.param(b"no json", b"", None, "cannot be read", id="no json"),
        pytest.param([1, 2], b"", None, "cannot be read", id="a list"),
        pytest.param(entry([2], [0, 8], "PICKLE"), bytes(8), None, "cannot be read", id="unknown type"),
        pytest.param(entry([2**60, 2**60], [0, 8]), bytes(8), None, "is broken", id="absurd size"),
        pytest.param(entry([-2], [0, 8]), bytes(8), None, "is no size", id="negative side"),
        pytest.param(entry([2], [0, 8, 8]), bytes(8), None, "cannot be read", id="three borders"),
        pytest.param(entry([2], [8, 16]), bytes(16), None, "is broken", id="a gap before it"),
        pytest.param(entry([2], [0, 8]), bytes(4), None, "truncated", id="data end early"),
        pytest.param(entry([2], [0, 8]), bytes(12), None, "longer", id="bytes after the last tensor"),
        pytest.param(
            entry([2], [0, 8]) | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
            bytes(12),
            None,
            "is broken",
            id="tensors overlap",
        ),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(header, data, length, message, source, capsys):
    with_header(source, header, data, length)
    assert message in said(source, capsys)


def test_a_truncated_file_is_named(source, capsys):
    whole = (source / "ema.safetensors").read_bytes()
    (source / "ema.safetensors").write_bytes(whole[:-100])
    assert "'" + str(source / "ema.safetensors") + "' is truncated" in said(source, capsys)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_not_read(suffix, source, capsys):
    torch.save({}, source / f"model{suffix}")
    assert "is a pickle" in said(source / f"model{suffix}", capsys, "--base", str(CHECKPOINT))


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_a_pickle_that_is_allowed_by_name_converts_as_safetensors_do(source, tmp_path, repository):
    weights = load_file(source / "ema.safetensors")
    (source / "ema.safetensors").unlink()
    names = sorted(weights)
    # In two files, and with one storage for two tensors.
    stacked = torch.stack([weights[names[0]], weights[names[0]] + 1])
    torch.save({names[0]: stacked[0]} | {name: weights[name] for name in names[1:40]}, source / "pytorch_model-1.bin")
    torch.save({name: weights[name] for name in names[40:]}, source / "pytorch_model-2.bin")
    allowed = ["--allow-pickle", "pytorch_model-1.bin", "pytorch_model-2.bin"]
    assert main([str(source), str(tmp_path / "out"), "--verify", *allowed]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys() and all(torch.equal(written[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (repository / "config.json").read_text()
    )


def test_a_single_pickle_may_be_the_source(source, tmp_path):
    torch.save(load_file(source / "ema.safetensors"), source / "ema.pt")
    options = ["--base", str(CHECKPOINT), "--allow-pickle", "ema.pt", "--dtype", "bfloat16"]
    assert main([str(source / "ema.pt"), str(tmp_path / "out"), *options]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({"a": Malicious()}, "cannot be read as tensors alone", id="code"),
        pytest.param([torch.zeros(2)], "holds a list", id="a list"),
        pytest.param({"model": {"a": torch.zeros(2)}}, "it holds model", id="nested"),
        pytest.param({"a": torch.zeros(2, 3).t()}, "as one piece", id="transposed"),
    ],
)
def test_an_allowed_pickle_holds_tensors_and_nothing_else(content, message, source, capsys, monkeypatch):
    monkeypatch.chdir(source)
    torch.save(content, source / "ema.pt")
    assert message in said(source, capsys, "--allow-pickle", "ema.pt")
    assert not (source / "touched").exists()


def test_an_allowed_pickle_must_fit_the_settings_too(source, capsys):
    torch.save({"llm2vae.weight": torch.zeros(2)}, source / "ema.pt")
    assert "does not fit its configuration" in said(source, capsys, "--allow-pickle", "ema.pt")


def test_old_pickles_are_to_be_saved_again(source, capsys):
    torch.save({"a": torch.zeros(2)}, source / "ema.pt", _use_new_zipfile_serialization=False)
    assert "Save it again" in said(source, capsys, "--allow-pickle", "ema.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere.pt", "no file"), ("ema.safetensors", "is no pickle"), ("../outside.pt", "leads out of")],
)
def test_names_of_allowed_pickles_are_checked(name, message, source, capsys):
    torch.save({}, source.parent / "outside.pt")
    assert message in said(source, capsys, "--allow-pickle", name)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "sub/../../outside.safetensors"])
def test_an_index_does_not_lead_out_of_the_folder(name, source, capsys):
    shutil.copy(source / "ema.safetensors", source.parent / "outside.safetensors")
    name = name if name[0] != "/" else str(source.parent / "outside.safetensors")
    index = {"weight_map": {"a": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "leads out of" in said(source, capsys)


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors", "tokenizer.json", "config.json"])
def test_links_out_of_the_folder_are_refused(name, source, capsys):
    shutil.move(source / name, source.parent / name)
    (source / name).symlink_to(source.parent / name)
    assert "leads out of" in said(source, capsys)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["config.json", "llm_config.json"], "config.json or llm_config.json"),
        (["tokenizer.json", "vocab.json"], "tokenizer"),
        (["ae.safetensors"], "ae.safetensors"),
        (["ema.safetensors"], "ema.safetensors"),
    ],
)
def test_what_is_missing_is_named(missing, message, source, capsys):
    for name in missing:
        (source / name).unlink()
    assert message in said(source, capsys)


@pytest.mark.parametrize("spoilt", ["missing", "unknown", "misshapen"])
def test_weights_that_do_not_fit_their_settings_are_refused(spoilt, source, capsys):
    weights = load_file(source / "ema.safetensors")
    if spoilt == "missing":
        del weights["llm2vae.weight"]
    elif spoilt == "unknown":
        weights["extra.weight"] = torch.zeros(3)
    else:
        weights["llm2vae.bias"] = torch.zeros(3)
    save_file(weights, source / "ema.safetensors")
    assert {"missing": "llm2vae.weight", "unknown": "extra.weight", "misshapen": "llm2vae.bias"}[spoilt] in said(
        source, capsys
    )


def test_there_is_no_such_source(tmp_path, capsys):
    assert "no file, no folder" in said(tmp_path / "nowhere", capsys)


def test_a_good_file_is_read_as_the_library_reads_it():
    for name in ("ema.safetensors", "ae.safetensors"):
        weights = load_file(CHECKPOINT / name)
        tensors = stored_tensors(CHECKPOINT / name)
        assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors} == {
            key: (value.dtype, tuple(value.shape)) for key, value in weights.items()
        }


def test_a_training_checkpoint_takes_the_rest_from_its_base(source, tmp_path, capsys):
    """A folder with the average and the last weights, nothing else."""
    training = tmp_path / "0001000"
    training.mkdir()
    shutil.move(source / "ema.safetensors", training)
    average = load_file(training / "ema.safetensors")
    save_file({name: weight + 1 for name, weight in average.items()}, training / "model.safetensors")
    written = {}
    for which in ("ema", "model", None):
        options = [] if which is None else ["--which", which]
        assert main([str(training), str(tmp_path / f"out-{which}"), "--base", str(CHECKPOINT), *options]) == 0
        written[which] = load_file(tmp_path / f"out-{which}" / "model.safetensors")
    name = "llm2vae.weight"
    assert torch.equal(written["ema"][name], average[name]) and torch.equal(written[None][name], average[name])
    assert torch.equal(written["model"][name], average[name] + 1)
    assert "Name a complete checkpoint with --base" in said(training, capsys)


def test_a_bare_file_of_weights_is_enough_with_a_base(tmp_path):
    file = tmp_path / "model.safetensors"
    shutil.copy(CHECKPOINT / "ema.safetensors", file)
    assert main([str(file), str(tmp_path / "repository"), "--base", str(CHECKPOINT)]) == 0
    assert (tmp_path / "repository" / "model_index.json").exists()
