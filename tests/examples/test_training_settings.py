"""A resumed training compares its settings with those of its checkpoint."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import train_full
import train_lora
from bagel_training.settings import FIXED
from safetensors.torch import load_file, save_file

from tests.examples.conftest import assert_same, changed, checkpoint_state, files_of, last_metrics, saved_weights


LORA = {"rank": 4, "max_train_steps": 1, "checkpointing_steps": 1}
FULL = {"max_train_steps": 1, "checkpointing_steps": 1, "ema": True}


@pytest.fixture(scope="module")
def started(train, tmp_path_factory):
    """A step of each kind of training, with its checkpoint."""
    return {
        train_lora: train(train_lora, tmp_path_factory.mktemp("lora"), **LORA),
        train_full: train(train_full, tmp_path_factory.mktemp("full"), **FULL),
    }


@pytest.fixture
def go_on(train, started, tmp_path):
    """`go_on(train_lora, rank=8)`: the second step, in a copy, of other settings."""

    def run(script, without=None, **settings):
        folder = tmp_path / "run"
        if not folder.exists():
            shutil.copytree(started[script] / "checkpoint-1", folder / "checkpoint-1")
        if without:
            (folder / "checkpoint-1" / without).unlink()
        base = LORA if script is train_lora else FULL
        settings = base | {"max_train_steps": 2, "resume_from_checkpoint": "latest"} | settings
        return train(script, folder, **settings)

    return run


@pytest.mark.parametrize(
    "script, name, value, message",
    [
        (train_lora, "rank", 8, "--rank 4, but this training has 8"),
        (train_lora, "lora_alpha", 8, "--lora_alpha 4, but this training has 8.0"),
        (
            train_lora,
            "lora_targets",
            "gen",
            "--lora_targets both, but this training has gen: weights would be dropped",
        ),
        (train_lora, "lora_layers", "q_proj", "--lora_layers None, but this training has q_proj"),
        (train_lora, "optimizer", "muon", "--optimizer adamw, but this training has muon"),
        (train_lora, "mixed_precision", "bf16", "--mixed_precision no, but this training has bf16"),
        (train_lora, "seed", 3, "--seed 0, but this training has 3"),
        (train_lora, "train_batch_size", 1, "--train_batch_size 2, but this training has 1"),
        (train_full, "freeze", ["und"], "--freeze none, but this training has und: weights would be dropped, or"),
        (train_full, "freeze", ["vit", "gen"], "--freeze none, but this training has gen vit"),
        (train_full, "ema", False, "--ema True, but this training has False"),
        (train_full, "optimizer", "muon", "--optimizer adamw, but this training has muon"),
    ],
)
def test_settings_that_would_lose_or_reinterpret_weights_are_refused(
    go_on, started, tmp_path, script, name, value, message
):
    with pytest.raises(ValueError, match=f"checkpoint-1' was written with {message}"):
        go_on(script, **{name: value})
    assert files_of(tmp_path / "run" / "checkpoint-1") == files_of(started[script] / "checkpoint-1")


@pytest.mark.parametrize("script", [train_lora, train_full], ids=lambda script: script.__name__)
def test_another_number_of_samples_is_refused(go_on, script, pictures):
    message = f"was written with 8 samples, but this training has 3 of --instance_data_dir {pictures}"
    with pytest.raises(ValueError, match=f"checkpoint-1' {message}: its place in the data would be another"):
        go_on(script, max_train_samples=3)


def test_the_other_script_is_refused(train, started, tmp_path):
    shutil.copytree(started[train_lora] / "checkpoint-1", tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="--script train_lora, but this training has train_full"):
        train(train_full, tmp_path, **FULL, resume_from_checkpoint="latest")


def test_what_may_change_is_said_and_has_effect(go_on, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    go_on(train_lora, learning_rate=5e-4, adam_weight_decay=0.5, validation_steps=7)
    lines = [record.getMessage() for record in caplog.records]
    told = [line.removeprefix("[RANK 0] ") for line in lines if "changed: " in line]
    # Everything that differs, and nothing else.
    assert sorted(told) == [
        "changed: adam_weight_decay 0.0001 -> 0.5",
        "changed: learning_rate 0.001 -> 0.0005",
        "changed: max_train_steps 1 -> 2",
        "changed: validation_steps 500 -> 7",
    ]
    assert last_metrics(tmp_path / "run")["lr"] == 5e-4


@pytest.mark.parametrize("change", [{"adam_weight_decay": 0.5}, {"adam_beta1": 0.5}, {"ema_decay": 0.0}], ids=str)
def test_a_setting_of_the_optimizer_or_the_average_that_changed_has_effect(go_on, train, started, tmp_path, change):
    same = saved_weights(go_on(train_full))
    shutil.rmtree(tmp_path / "run")
    assert changed(saved_weights(go_on(train_full, **change)), same)


def test_the_page_lists_what_must_not_change():
    page = (Path(train_lora.__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    refused = "".join(line for line in page.splitlines() if line.startswith("| `--") and "| refused" in line)
    assert [name for name in FIXED if name != "script" and f"`--{name}`" not in refused] == []


def test_settings_are_kept_without_secrets(train, tmp_path):
    train(train_lora, tmp_path, **LORA, hub_token="a-secret-token")
    file = tmp_path / "checkpoint-1" / "settings.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    assert settings["lora_alpha"] == 4 and settings["mixed_precision"] == "no"
    assert all(b"a-secret-token" not in content for content in files_of(tmp_path).values())


def test_another_base_model_is_refused(go_on, checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    (file,) = (other / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights[next(name for name in weights if name.endswith("mlp.up_proj.weight"))] *= 2
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path holds other weights than"):
        go_on(train_lora, pretrained_model_name_or_path=other)


def test_the_base_model_may_stand_elsewhere(go_on, checkpoint, tmp_path):
    same = saved_weights(go_on(train_lora))
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(checkpoint, tmp_path / "other")
    assert_same(saved_weights(go_on(train_lora, pretrained_model_name_or_path=tmp_path / "other")), same)


def test_a_checkpoint_of_an_earlier_version_goes_on_and_that_is_said(go_on, tmp_path, caplog):
    same = saved_weights(go_on(train_lora))
    shutil.rmtree(tmp_path / "run")
    assert_same(saved_weights(go_on(train_lora, without="settings.json")), same)
    assert "keeps no settings" in caplog.text


@pytest.mark.parametrize(
    "script, change",
    [
        (train_lora, {"rank": 8}),
        (train_lora, {"lora_targets": "gen"}),
        (train_full, {"freeze": ["und"]}),
        (train_full, {"optimizer": "muon"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_weights_of_an_earlier_version_are_never_dropped(go_on, script, change):
    with pytest.raises(ValueError, match="checkpoint-1' holds other weights than this training trains: "):
        go_on(script, without="settings.json", **change)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_broken_settings_are_named(go_on, started, tmp_path, content):
    shutil.copytree(started[train_lora] / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    (tmp_path / "run" / "checkpoint-1" / "settings.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="settings.json' is broken"):
        go_on(train_lora)


def damage(file, how):
    if how == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(b"" if how == "empty" else content[: len(content) // 2])


@pytest.mark.parametrize("how", ["missing", "empty", "truncated"])
@pytest.mark.parametrize("name", ["rank_0.pt", "weights/.metadata", "weights/__0_0.distcp"])
def test_a_broken_checkpoint_is_named_with_those_that_are_left(go_on, started, tmp_path, name, how):
    for step in (1, 3):
        shutil.copytree(started[train_lora] / "checkpoint-1", tmp_path / "run" / f"checkpoint-{step}")
    damage(tmp_path / "run" / "checkpoint-3" / name, how)
    message = "is no checkpoint" if (name, how) == ("rank_0.pt", "missing") else "is broken .*there is checkpoint-1"
    with pytest.raises(ValueError, match=message) as refused:
        go_on(train_lora)
    assert "checkpoint-3" in str(refused.value)
    assert "Traceback" not in str(refused.value)


def test_weights_that_went_on_equal_those_of_a_whole_run(train, go_on, tmp_path):
    """Of the comparisons above: with the same settings nothing differs."""
    whole = train(train_lora, tmp_path / "whole", **LORA | {"max_train_steps": 2})
    go_on(train_lora)
    states = [checkpoint_state(folder / "checkpoint-2") for folder in (whole, tmp_path / "run")]
    assert_same(*states)
