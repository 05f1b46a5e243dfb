"""What a checkpoint from anywhere might try, and what is missing in one: an error that names it, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from convert_bagel_to_hf import main
from convert_hf_to_bagel import main as convert_back
from merge_lora import main as merge_lora
from original_files import find_original_files
from safetensors.torch import load_file, save_file
from sources import opened
from streaming import pieces

from diffusers_bagel import BagelPipeline, BagelSession
from tests.conftest import CHECKPOINT
from transformers_bagel import BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.stored_tensors import stored_tensors


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
        pytest.param(b'{"a":' * 100_000, b"", None, "cannot be read", id="too deep"),
        pytest.param([1, 2], b"", None, "cannot be read", id="a list"),
        pytest.param(entry([2], [0, 8], "PICKLE"), bytes(8), None, "cannot be read", id="unknown type"),
        pytest.param(entry([2**60, 2**60], [0, 8]), bytes(8), None, "its header says", id="absurd size"),
        pytest.param(entry([-2], [0, 8]), bytes(8), None, "is no size", id="negative side"),
        pytest.param(entry([2], [0, 8, 8]), bytes(8), None, "cannot be read", id="three borders"),
        pytest.param(entry([2], [8, 16]), bytes(16), None, "its header says", id="a gap before it"),
        pytest.param(entry([2], [0, 8]), bytes(4), None, "truncated", id="data end early"),
        pytest.param(entry([2], [0, 8]), bytes(12), None, "81 bytes instead of 77", id="bytes after the last tensor"),
        pytest.param(
            entry([2], [0, 8]) | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
            bytes(12),
            None,
            "its header says",
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
    assert f"'{source / 'ema.safetensors'}' is truncated" in said(source, capsys)


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
        pytest.param({"a": torch.eye(2).to_sparse()}, "", id="sparse"),
        pytest.param({"a": torch.zeros(2, dtype=torch.complex64)}, "as one piece", id="complex"),
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


def rewritten(file: Path, change) -> None:
    """A zip file whose parts went through `change(name, content) -> (content, compression)`."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            content, compression = change(name, content)
            archive.writestr(name, content, compression)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda name, content: (content, zipfile.ZIP_DEFLATED), "is compressed", id="compressed"),
        pytest.param(
            lambda name, content: (content[:16] if "/data/" in name else content, zipfile.ZIP_STORED),
            "",
            id="short data",
        ),
        pytest.param(
            lambda name, content: (b"big" if "byteorder" in name else content, zipfile.ZIP_STORED),
            "another order of bytes",
            id="big-endian",
        ),
    ],
)
def test_a_pickle_whose_data_are_not_where_it_says_is_refused(change, message, source, capsys):
    torch.save({"a": torch.arange(100.0)}, source / "ema.pt")
    rewritten(source / "ema.pt", change)
    assert message in said(source, capsys, "--allow-pickle", "ema.pt")


def test_a_cut_pickle_is_refused(source, capsys):
    torch.save({"a": torch.arange(100.0)}, source / "ema.pt")
    (source / "ema.pt").write_bytes((source / "ema.pt").read_bytes()[:-200])
    assert "no whole file of `torch.save`" in said(source, capsys, "--allow-pickle", "ema.pt")


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
    assert "leads out of" in said(source, capsys, "--which", "model")


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[]", "must hold a JSON object"),
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", '{"llm_config": {"hidden_size": "x"}}', "cannot be used"),
        ("tokenizer.json", "{}", "cannot be used"),
        ("preprocessor_config.json", '{"size": {"height": 384, "width": 384}}', "cannot be used"),
        ("ae.safetensors", "", "ae.safetensors"),
    ],
)
def test_broken_small_files_are_named_before_anything_is_written(name, content, message, source, capsys):
    (source / name).write_text(content)
    assert message in said(source, capsys)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "["])
def test_a_broken_index_is_named(content, source, capsys):
    (source / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in said(source, capsys, "--which", "model")


def test_a_broken_vae_is_named(source, capsys):
    weights = load_file(source / "ae.safetensors")
    del weights["decoder.conv_out.bias"]
    save_file(weights, source / "ae.safetensors")
    error = said(source, capsys)
    assert f"'{source / 'ae.safetensors'}' is not a whole BAGEL VAE" in error and "decoder.conv_out.bias" in error


@pytest.mark.parametrize("content", [b"---\na: [\n---\n", b"\xff\xfe"])
def test_a_broken_card_of_the_source_is_left_out(content, source, tmp_path, capsys):
    (source / "README.md").write_bytes(content)
    assert main([str(source), str(tmp_path / "repository")]) == 0
    assert f"'{source / 'README.md'}' cannot be read" in capsys.readouterr().err


def test_a_tokenizer_that_wants_to_run_code_is_not_asked_about(source, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asked"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["other/repo--tok.Tok", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    main([str(source), str(tmp_path / "repository")])


def test_a_file_that_shrinks_while_it_is_read_is_noticed(source, tmp_path):
    tensor = stored_tensors(source / "ema.safetensors")[-1]
    whole = (source / "ema.safetensors").read_bytes()
    (source / "ema.safetensors").write_bytes(whole[:-4])
    with pytest.raises(OSError, match=f"in the middle of '{tensor.name}'"):
        list(pieces(tensor, tensor.dtype))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_the_way_back_and_merging_follow_no_link_out_either(name, repository, tmp_path, capsys):
    linked = Path(shutil.copytree(repository, tmp_path / "linked"))
    name = "model-00001-of-00003.safetensors" if name == "model.safetensors" else name
    shutil.move(linked / name, tmp_path / "outside")
    (linked / name).symlink_to(tmp_path / "outside")
    assert convert_back([str(linked), str(tmp_path / "back")]) == 2
    assert merge_lora([str(linked), str(tmp_path / "merged"), "--loras", str(tmp_path / "no lora")]) == 2
    assert capsys.readouterr().err.count("leads out of") == 2
    assert not (tmp_path / "back").exists() and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("spoilt", ["a tensor", "the tokenizer", "the VAE"])
def test_the_way_back_refuses_what_is_not_whole(spoilt, repository, tmp_path, capsys):
    broken = Path(shutil.copytree(repository, tmp_path / "broken"))
    if spoilt == "a tensor":
        last = broken / "model-00003-of-00003.safetensors"
        weights = load_file(last)
        del weights["vit_pos_embed.pos_embed"]
        save_file(weights, last)
    elif spoilt == "the tokenizer":
        for name in ("tokenizer.json", "vocab.json"):
            (broken / name).unlink(missing_ok=True)
    else:
        save_file({"a": torch.zeros(2)}, broken / "vae" / "diffusion_pytorch_model.safetensors")
    assert convert_back([str(broken), str(tmp_path / "back")]) == 2
    expected = {"a tensor": "vit_pos_embed", "the tokenizer": "tokenizer is missing", "the VAE": "no `AutoencoderKL`"}
    assert expected[spoilt] in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_snapshot_of_the_hubs_cache_is_a_source(tmp_path):
    """The path that `hf download` prints: links into the folder of blobs beside it."""
    cache = tmp_path / "models--org--bagel"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in CHECKPOINT.iterdir():
        shutil.copy(file, cache / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert main([str(snapshot), str(tmp_path / "repository")]) == 0
    assert main([str(snapshot / "ema.safetensors"), str(tmp_path / "again")]) == 0


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


@pytest.fixture
def both(source) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with the average, and other weights in shards with an index; and the average."""
    average = load_file(source / "ema.safetensors")
    names = sorted(average)
    parts = {"model-00001-of-00002.safetensors": names[:50], "model-00002-of-00002.safetensors": names[50:]}
    for file, own in parts.items():
        save_file({name: average[name] + 1 for name in own}, source / file)
    weight_map = {name: file for file, own in parts.items() for name in own}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return source, average


@pytest.mark.parametrize(("which", "offset"), [(None, 0), ("ema", 0), ("model", 1)])
def test_shards_are_the_last_weights_and_not_the_average(which, offset, both, tmp_path):
    source, average = both
    options = [] if which is None else ["--which", which]
    assert main([str(source), str(tmp_path / "repository"), "--verify", *options]) == 0
    written = load_file(tmp_path / "repository" / "model.safetensors")
    assert written.keys() == average.keys()
    assert all(torch.equal(written[name], average[name] + offset) for name in average)


def test_shards_alone_are_a_source(both, tmp_path, capsys):
    source, average = both
    (source / "ema.safetensors").unlink()
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["llm2vae.weight"], average["llm2vae.weight"] + 1
    )
    assert "holds no ema.safetensors" in said(source, capsys, "--which", "ema")
    (source / "model-00002-of-00002.safetensors").unlink()
    assert "no file 'model-00002-of-00002.safetensors'" in said(source, capsys)


def test_which_does_not_contradict_the_file_or_the_pickles(source, capsys):
    assert "holds the other weights" in said(source / "ema.safetensors", capsys, "--which", "model")
    torch.save({}, source / "ema.pt")
    assert "--which" in said(source, capsys, "--which", "ema", "--allow-pickle", "ema.pt")


def test_other_files_of_a_training_are_left_alone(source, tmp_path):
    """As the original training script leaves them beside its weights."""
    training = tmp_path / "0001000"
    training.mkdir()
    shutil.move(source / "ema.safetensors", training)
    torch.save({"state": Malicious()}, training / "optimizer.00000-of-00008.pt")
    torch.save({"state": Malicious()}, training / "scheduler.pt")
    torch.save([Malicious()], training / "data_status.pt")
    assert main([str(training), str(tmp_path / "repository"), "--base", str(CHECKPOINT)]) == 0
    assert not Path("touched").exists()


def test_settings_and_tokenizer_are_each_taken_from_one_place(source, tmp_path):
    """The source has a vocabulary of its own, and the base a tokenizer.json, which does not fit it."""
    own = tmp_path / "own"
    own.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "ema.safetensors"):
        shutil.copy(source / name, own)
    settings = json.loads((source / "config.json").read_text())
    (own / "llm_config.json").write_text(json.dumps(settings["llm_config"] | {"rms_norm_eps": 0.5}))
    (own / "vit_config.json").write_text(json.dumps(settings["vit_config"]))
    files = find_original_files(opened(str(own)), opened(str(CHECKPOINT)), None)
    places = {name: file.parent for name, file in files.descriptions.items()}
    assert set(places.values()) == {own} and "tokenizer.json" not in places and "config.json" not in places
    assert files.vae.parent == CHECKPOINT


def test_a_template_of_chats_is_not_taken_over(source, tmp_path):
    """Newer libraries write one beside any tokenizer; the original layout has none, and its prompts are not Qwen's."""
    (source / "chat_template.jinja").write_text("{{ 'other' }}")
    assert main([str(source), str(tmp_path / "repository")]) == 0
    assert "other" not in (tmp_path / "repository" / "chat_template.jinja").read_text()


def test_a_bare_file_of_weights_is_enough_with_a_base(tmp_path):
    file = tmp_path / "model.safetensors"
    shutil.copy(CHECKPOINT / "ema.safetensors", file)
    assert main([str(file), str(tmp_path / "repository"), "--base", str(CHECKPOINT)]) == 0
    assert (tmp_path / "repository" / "model_index.json").exists()


def spoilt_weights(source: Path, name: str, value: float, rows: slice = slice(None)) -> None:
    weights = load_file(source / "ema.safetensors")
    weights[name][rows] = value
    save_file(weights, source / "ema.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "rows", "options"),
    [
        ("language_model.lm_head.weight", torch.nan, slice(7, 8), []),
        ("language_model.model.norm.weight", torch.inf, slice(3, 4), []),
        # A row that is not looked at without --verify.
        ("language_model.model.embed_tokens.weight", torch.nan, slice(5, 6), ["--verify"]),
        ("llm2vae.weight", -torch.inf, slice(1, 2), ["--verify", "--dtype", "bfloat16"]),
    ],
)
def test_numbers_that_are_not_finite_are_not_written(name, value, rows, options, source, capsys):
    spoilt_weights(source, name, value, rows)
    error = said(source, capsys, *options)
    assert name in error and "not finite" in error


def test_verifying_finds_a_number_that_is_not_finite_in_a_pickle(source, capsys):
    spoilt_weights(source, "language_model.model.embed_tokens.weight", torch.nan, slice(5, 6))
    torch.save(load_file(source / "ema.safetensors"), source / "ema.pt")
    assert "not finite" in said(source, capsys, "--allow-pickle", "ema.pt", "--verify")


def test_integers_are_no_weights(source, capsys):
    weights = load_file(source / "ema.safetensors")
    save_file(weights | {"llm2vae.bias": weights["llm2vae.bias"].to(torch.int32)}, source / "ema.safetensors")
    assert "int32 instead of floating numbers in llm2vae.bias" in said(source, capsys)


@pytest.mark.parametrize("name", ["ema.safetensors", "tokenizer.json"])
def test_a_pipe_is_refused_and_not_waited_for(name, source, capsys):
    (source / name).unlink()
    os.mkfifo(source / name)
    assert name in said(source, capsys)


def test_absurd_layers_are_refused_on_the_way_back_before_a_model_is_made(repository, tmp_path, capsys):
    absurd = Path(shutil.copytree(repository, tmp_path / "absurd"))
    settings = json.loads((absurd / "config.json").read_text())
    settings["text_config"] |= {"num_hidden_layers": 900, "layer_types": None}
    (absurd / "config.json").write_text(json.dumps(settings))
    assert convert_back([str(absurd), str(tmp_path / "back")]) == 2
    assert "`text_config.num_hidden_layers` in config.json is 900" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model_bf16.safetensors", "rvr.safetensors"])
def test_the_conversion_finds_weights_as_loading_does(name, source, tmp_path, capsys):
    """A stale index and a file of another name; then BAGEL's own average beside it, too."""
    average = load_file(source / "ema.safetensors")
    tuned = average | {"llm2vae.bias": average["llm2vae.bias"] + 1}
    save_file(tuned, source / name)
    (source / "ema.safetensors").rename(source / "set aside")
    for place in ("alone", "beside"):
        if place == "beside":
            (source / "set aside").rename(source / "ema.safetensors")
        assert main([str(source), str(tmp_path / place)]) == 0
        written = load_file(tmp_path / place / "model.safetensors")["llm2vae.bias"]
        is_bagels = place == "beside" and name.startswith("model")
        assert torch.equal(written, (average if is_bagels else tuned)["llm2vae.bias"])


def test_the_conversion_says_which_files_it_saw(source, capsys):
    (source / "ema.safetensors").rename(source / "tuned.bin")
    (source / "model.safetensors.index.json").unlink()
    assert "its files of weights are ae.safetensors, tuned.bin" in said(source, capsys)


def test_extra_modules_are_left_out_when_asked(source, tmp_path, capsys):
    weights = load_file(source / "ema.safetensors")
    save_file(weights | {"depth_head.weight": torch.zeros(2)}, source / "ema.safetensors")
    assert "depth_head" in said(source, capsys)
    assert main([str(source), str(tmp_path / "out"), "--ignore-unexpected-keys", "--verify"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weights.keys()


def test_a_repository_without_position_tables_gets_them_when_it_is_loaded(source, tmp_path):
    weights = load_file(source / "ema.safetensors")
    table = weights.pop("vit_pos_embed.pos_embed")
    save_file(weights, source / "ema.safetensors")
    assert main([str(source), str(tmp_path / "out")]) == 0
    loaded = BagelForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (loaded.model.vit_pos_embed.pos_embed - table).abs().max() <= 1e-6


def test_a_known_fine_tune_keeps_the_sizes_of_its_images_and_its_protocol(source, tmp_path):
    twiff = source.rename(source.parent / "TwiFF-7B")
    assert main([str(twiff), str(tmp_path / "out")]) == 0
    settings = BagelProcessor.from_pretrained(tmp_path / "out").image_processor
    assert (settings.size["longest_edge"], settings.vae_size["longest_edge"]) == (518, 512)
    assert BagelSession(BagelPipeline.from_pretrained(tmp_path / "out")).protocol.name == "twiff"


@pytest.mark.parametrize("kind", ["lora", "text model"])
def test_what_is_no_bagel_is_not_converted(kind, source, capsys):
    name = {
        "lora": "language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "text model": "model.layers.0.mlp.weight",
    }
    save_file({name[kind]: torch.zeros(2, 2)}, source / "ema.safetensors")
    assert {"lora": "is a LoRA", "text model": "another model"}[kind] in said(source, capsys)


@pytest.mark.parametrize("arguments", [(), ("--ignore-unexpected-keys",)])
def test_weights_in_fp8_are_not_converted_without_their_factors(arguments, source, capsys):
    weights = load_file(source / "ema.safetensors")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    packed = {name: weights[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.full((), 2.0)}
    save_file(weights | packed, source / "ema.safetensors")
    assert f"in FP8 with factors ({name}_scale), which are not converted" in said(source, capsys, *arguments)
