"""Output folders: those that cannot be written, and those of another training."""

from __future__ import annotations

import os
import shutil

import pytest
import train_full
import train_lora

from tests.examples.conftest import (
    arguments,
    assert_same,
    checkpoint_state,
    checkpoints,
    files_of,
    full_disk,
    not_finite,
    saved_weights,
)


STEP = {"rank": 2, "max_train_steps": 1, "checkpointing_steps": 1}


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    return train(train_lora, tmp_path_factory.mktemp("finished"), **STEP)


@pytest.fixture
def old(finished, tmp_path):
    """A copy of a finished training."""
    shutil.copytree(finished, tmp_path / "old")
    return tmp_path / "old"


def refused(capsys, script=train_lora, **settings) -> str:
    """What the arguments are refused with, before anything is loaded."""
    base = {"pretrained_model_name_or_path": "no/such/model", "instance_data_dir": "no/such/data"}
    with pytest.raises(SystemExit):
        script.parse_args(arguments(**(base | settings)))
    return capsys.readouterr().err


@pytest.mark.parametrize("script", [train_full, train_lora], ids=lambda script: script.__name__)
@pytest.mark.parametrize("left", ["all", "checkpoint", "adapter", "pipeline", "card"])
def test_a_new_training_into_the_folder_of_an_old_one_is_refused(script, left, old, capsys):
    kept = {
        "all": [],
        "checkpoint": ["checkpoint-1"],
        "adapter": ["pytorch_lora_weights.safetensors"],
        "pipeline": ["transformer"],
        "card": ["README.md"],
    }[left]
    if left == "pipeline":
        (old / "transformer").mkdir()
    for path in old.iterdir():
        if kept and path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files_of(old)
    message = refused(capsys, script, output_dir=old)
    assert "holds a training already" in message
    assert "--resume_from_checkpoint latest" in message and "--overwrite_output_dir" in message
    assert files_of(old) == before


def test_what_is_no_result_of_a_training_is_no_hindrance(train, finished, tmp_path):
    for name in ("logs", "latents", "checkpoint-best", ".checkpoint-3.unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / "data.parquet").write_bytes(b"mine")
    train(train_lora, tmp_path, **STEP)
    assert_same(saved_weights(tmp_path), saved_weights(finished))
    assert (tmp_path / "data.parquet").read_bytes() == b"mine"


def test_latest_of_a_folder_without_checkpoints_spares_its_results(old, capsys):
    shutil.rmtree(old / "checkpoint-1")
    assert "no checkpoint of it" in refused(capsys, output_dir=old, resume_from_checkpoint="latest")


def test_overwriting_and_going_on_are_two_things(old, capsys):
    message = refused(capsys, output_dir=old, resume_from_checkpoint="latest", overwrite_output_dir=True)
    assert "not both" in message


def test_overwriting_leaves_nothing_of_the_old_training(train, old, tmp_path):
    train(train_lora, old, **STEP | {"checkpointing_steps": 9}, seed=1, overwrite_output_dir=True)
    new = train(train_lora, tmp_path / "new", **STEP | {"checkpointing_steps": 9}, seed=1)
    assert_same(saved_weights(old), saved_weights(new))
    assert sorted(path.name for path in old.iterdir()) == sorted(path.name for path in new.iterdir())


def test_overwriting_by_the_other_script_leaves_no_adapter(train, old):
    train(train_full, old, max_train_steps=1, overwrite_output_dir=True)
    assert not (old / "pytorch_lora_weights.safetensors").exists() and not checkpoints(old)


@pytest.mark.parametrize("fails", ["at the start", "at the first checkpoint", "by its loss"])
def test_overwriting_deletes_nothing_before_there_is_something_new(train, old, fails):
    weights, state = saved_weights(old), checkpoint_state(old / "checkpoint-1")
    if fails == "at the start":
        with pytest.raises(OSError, match="no BAGEL pipeline"):
            train(train_lora, old, **STEP, overwrite_output_dir=True, pretrained_model_name_or_path=old.parent)
        kept = old
    elif fails == "at the first checkpoint":
        with full_disk(step=1):
            train(train_lora, old, **STEP, overwrite_output_dir=True)
        kept = old / ".replaced-1"
    else:
        with pytest.raises(FloatingPointError), not_finite(1):
            train(train_lora, old, **STEP, overwrite_output_dir=True)
        kept = old / ".replaced-1"
    assert_same(saved_weights(kept), weights)
    assert_same(checkpoint_state(kept / "checkpoint-1"), state)
    # What is out of the way is not gone on from.
    if kept != old:
        assert not checkpoints(old)
        train(train_lora, old, **STEP, overwrite_output_dir=True)
        assert not list(old.glob(".replaced*")) and checkpoints(old) == ["checkpoint-1"]


def test_a_checkpoint_is_not_gone_on_from_in_the_folder_of_another_training(train, old, tmp_path):
    other = train(train_lora, tmp_path / "other", **STEP, seed=1)
    before = files_of(old)
    settings = STEP | {"max_train_steps": 2, "resume_from_checkpoint": other / "checkpoint-1", "seed": 1}
    with pytest.raises(ValueError, match="holds another training than the one of"):
        train(train_lora, old, **settings)
    shutil.rmtree(old / "checkpoint-1")
    with pytest.raises(ValueError, match="holds another training than the one of"):
        train(train_lora, old, **settings)
    assert files_of(old).items() <= before.items()
    train(train_lora, tmp_path / "third", **settings)
    assert checkpoints(tmp_path / "third") == ["checkpoint-2"]
    train(train_lora, tmp_path / "third", **settings | {"max_train_steps": 3})
    assert checkpoints(tmp_path / "third") == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("kind", ["file", "below a file", "broken link", "link to a file", "fifo"])
def test_an_output_dir_that_cannot_be_one_is_refused(kind, tmp_path, capsys):
    file, link, target = tmp_path / "file", tmp_path / "link", tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    if kind == "fifo":
        target = tmp_path / "fifo"
        os.mkfifo(target)
    elif kind == "below a file":
        target = file / "a" / "b"
    elif kind != "file":
        link.symlink_to(file if kind == "link to a file" else tmp_path / "nowhere")
        target = link
    assert "--output_dir must be a folder, but '" in refused(capsys, output_dir=target)
    assert file.read_text(encoding="utf-8") == "mine"


def test_an_output_dir_that_cannot_be_written_is_refused(capsys, tmp_path):
    target = tmp_path / "closed"
    target.mkdir(mode=0o500)
    if os.access(target, os.W_OK):
        # The administrator may write anywhere but where the system allows it to nobody.
        target = "/proc/1/new/run"
    assert "cannot be written" in refused(capsys, output_dir=target)


def test_a_link_to_a_folder_is_a_folder(train, finished, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    train(train_lora, tmp_path / "link", **STEP)
    assert_same(saved_weights(tmp_path / "disk"), saved_weights(finished))


@pytest.mark.parametrize("script", [train_full, train_lora], ids=lambda script: script.__name__)
@pytest.mark.parametrize("fails", ["the model", "the first batch"])
def test_what_fails_before_the_first_step_leaves_no_folder(train, script, fails, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "broken.png").write_bytes(b"no picture")
    settings = {"instance_data_dir": tmp_path / "data"} if fails == "the first batch" else {}
    settings |= {"pretrained_model_name_or_path": tmp_path} if fails == "the model" else {}
    message = "no BAGEL pipeline" if fails == "the model" else "broken.png"
    with pytest.raises((ValueError, OSError), match=message):
        train(script, tmp_path / "out", report_to="tensorboard", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [train_full, train_lora], ids=lambda script: script.__name__)
def test_the_base_model_is_never_the_output(script, checkpoint, tmp_path, capsys):
    (tmp_path / "link").symlink_to(checkpoint)
    for folder in (checkpoint, tmp_path / "link"):
        for overwrite in (False, True):
            settings = {"output_dir": folder, "overwrite_output_dir": overwrite}
            assert "must stay" in refused(capsys, script, pretrained_model_name_or_path=checkpoint, **settings)
