"""`examples/train_full.py`: resuming, averages, frozen towers, precision, what it writes."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
import train_full
from bagel_training.validation import Validation
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_bagel import BagelPipeline
from diffusers_bagel.few_steps import FewSteps
from tests.conftest import run_snippets
from tests.examples.conftest import (
    PROMPT,
    assert_same,
    changed,
    checkpoint_state,
    checkpoints,
    counted_calls,
    drawn,
    full_disk,
    last_metrics,
    load_card,
    saved_weights,
    validation_picture,
)
from transformers_bagel import BagelConfig, BagelProcessor
from transformers_bagel.training.freezing import FREEZABLE_PARTS


# Everything that a checkpoint has to carry; the validations in between must leave no trace.
RESUMABLE = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
    "ema": True,
    "validation_prompt": PROMPT,
    "validation_steps": 1,
}


@pytest.fixture(scope="module")
def uninterrupted(train, conversations, tmp_path_factory):
    return train(
        train_full, tmp_path_factory.mktemp("run"), **RESUMABLE, train_data_file=conversations, report_to="tensorboard"
    )


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    """Two steps without anything special."""
    return train(train_full, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def to_resume(uninterrupted, tmp_path):
    """What is left of a run that was killed after its second step."""
    shutil.copytree(uninterrupted / "checkpoint-2", tmp_path / "checkpoint-2")
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_resumed_after_a_full_disk_equals_uninterrupted(train, conversations, uninterrupted, tmp_path):
    settings = RESUMABLE | {"train_data_file": conversations}
    with full_disk(step=4):
        train(train_full, tmp_path, **settings)
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert (tmp_path / ".checkpoint-4.unfinished" / "weights").exists()
    train(train_full, tmp_path, **settings, resume_from_checkpoint="latest")
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert not list(tmp_path.glob(".checkpoint*"))
    for step in (2, 4):
        name = f"checkpoint-{step}"
        assert_same(checkpoint_state(tmp_path / name), checkpoint_state(uninterrupted / name))
    assert_same(saved_weights(tmp_path), saved_weights(uninterrupted))
    for step in (1, 2, 3, 4):
        assert validation_picture(tmp_path, step) == validation_picture(uninterrupted, step)
    pictures = {validation_picture(uninterrupted, step) for step in (1, 2, 3, 4)}
    assert len(pictures) == 4


def test_checkpoint_holds_weights_moments_and_average(uninterrupted, checkpoint):
    """Of empty checkpoints the comparison above would hold, too."""
    state = checkpoint_state(uninterrupted / "checkpoint-4")
    # Tables of positions are no weights.
    trained = {name for name in saved_weights(uninterrupted) if "pos_embed" not in name}
    for place in (
        "/weights/model/{}",
        "/weights/optimizer/state/{}/exp_avg",
        "/weights/optimizer/state/{}/exp_avg_sq",
    ):
        assert {place.format(name) for name in trained} <= state.keys()
    assert len([place for place in state if place.startswith("/own/ema/shadow_params/")]) == len(trained)
    assert any(place.startswith("/own/random/") for place in state)
    # The average, which lags behind the weights, is what is saved.
    saved = saved_weights(uninterrupted)
    assert changed({name: state[f"/weights/model/{name}"] for name in saved}, saved)


@pytest.mark.parametrize("name", ["checkpoint-2", "path"])
def test_resume_of_a_named_folder(train, conversations, uninterrupted, to_resume, tmp_path, name):
    # A later checkpoint, which is not the one that is asked for.
    shutil.copytree(uninterrupted / "checkpoint-4", tmp_path / "checkpoint-3")
    named = str(uninterrupted / "checkpoint-2") if name == "path" else name
    train(train_full, to_resume, **RESUMABLE, train_data_file=conversations, resume_from_checkpoint=named)
    assert_same(saved_weights(to_resume), saved_weights(uninterrupted))


def test_resume_of_a_missing_folder(train, tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint-7"):
        train(train_full, tmp_path, resume_from_checkpoint="checkpoint-7")


def test_latest_of_none_starts_at_the_beginning(train, plain, tmp_path):
    # Neither an unfinished one nor a folder of another name is a checkpoint.
    for name in (".checkpoint-9.unfinished", "checkpoint-best", "checkpoint-9.old"):
        (tmp_path / name).mkdir()
    train(train_full, tmp_path, resume_from_checkpoint="latest")
    assert_same(saved_weights(tmp_path), saved_weights(plain))


def test_checkpoint_of_another_number_of_processes_is_refused(train, conversations, to_resume):
    shutil.copy(to_resume / "checkpoint-2" / "rank_0.pt", to_resume / "checkpoint-2" / "rank_1.pt")
    with pytest.raises(ValueError, match="written by 2 processes, but this training has 1"):
        train(train_full, to_resume, **RESUMABLE, train_data_file=conversations, resume_from_checkpoint="latest")


def test_checkpoint_without_an_average_is_refused_for_one(train, tmp_path):
    train(train_full, tmp_path, max_train_steps=1, checkpointing_steps=1)
    with pytest.raises(ValueError, match="no average of the weights"):
        train(train_full, tmp_path, ema=True, resume_from_checkpoint="latest")


def test_finished_run_is_resumed_without_a_step(train, conversations, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoint-4", tmp_path / "checkpoint-4")
    train(train_full, tmp_path, **RESUMABLE, train_data_file=conversations, resume_from_checkpoint="latest")
    assert_same(saved_weights(tmp_path), saved_weights(uninterrupted))
    assert last_metrics(tmp_path) == {"step": 4}


def test_limit_keeps_the_newest(train, tmp_path):
    train(train_full, tmp_path, max_train_steps=11, checkpointing_steps=1, checkpoints_total_limit=2)
    # By number, not by name.
    assert checkpoints(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_limit_deletes_only_after_the_new_one_is_complete(train, tmp_path):
    with full_disk(step=2):
        train(train_full, tmp_path, checkpointing_steps=1, checkpoints_total_limit=1)
    assert checkpoints(tmp_path) == ["checkpoint-1"]
    before = checkpoint_state(tmp_path / "checkpoint-1")
    train(
        train_full, tmp_path, checkpointing_steps=1, checkpoints_total_limit=1, resume_from_checkpoint="checkpoint-1"
    )
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert changed(checkpoint_state(tmp_path / "checkpoint-2"), before)


def test_limit_does_not_delete_what_was_just_written(train, tmp_path):
    """A run that goes on from before its newest checkpoint."""
    train(train_full, tmp_path, max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=3)
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    train(train_full, tmp_path, **settings, resume_from_checkpoint="checkpoint-1")
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def test_checkpoint_of_the_same_step_is_replaced_whole(train, tmp_path, monkeypatch):
    """The older one is there until the new one stands in its place, and no half of it afterwards."""
    settings = {"checkpointing_steps": 1}
    train(train_full, tmp_path, **settings)
    first = checkpoint_state(tmp_path / "checkpoint-2")
    settings["resume_from_checkpoint"] = "checkpoint-1"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted_deletion)
        train(train_full, tmp_path, **settings, learning_rate=2e-3)
    second = checkpoint_state(tmp_path / "checkpoint-2")
    assert second.keys() == first.keys()
    assert changed(second, first)
    train(train_full, tmp_path, **settings, learning_rate=3e-3)
    assert changed(checkpoint_state(tmp_path / "checkpoint-2"), second)
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def interrupted_deletion(path, *args, rmtree=shutil.rmtree, **kwargs):
    """`shutil.rmtree` that is interrupted after a file, once a checkpoint is what it deletes."""
    for file in path.rglob("rank_0.pt"):
        file.unlink()
        raise KeyboardInterrupt
    rmtree(path, *args, **kwargs)


@pytest.mark.parametrize("device", ["cpu", "sharded"])
def test_average_is_that_of_the_weights(train, plain, tmp_path, device):
    train(train_full, tmp_path, ema=True, ema_device=device, checkpointing_steps=1)
    start, end = (checkpoint_state(tmp_path / f"checkpoint-{step}") for step in (1, 2))
    # The average is no part of the training.
    assert_same({name: end[f"/weights/model/{name}"] for name in saved_weights(plain)}, saved_weights(plain))
    for name, average in saved_weights(tmp_path).items():
        # diffusers' decay warms up: it is 0 at the first step, then (1 + 1) / (10 + 1).
        first, second = start[f"/weights/model/{name}"], end[f"/weights/model/{name}"]
        torch.testing.assert_close(average, first + (1 - 2 / 11) * (second - first), rtol=1e-5, atol=1e-7)


def test_average_on_the_cpu_equals_sharded(train, tmp_path):
    settings = {"max_train_steps": 3, "ema": True, "ema_decay": 0.15}
    runs = [train(train_full, tmp_path / device, **settings, ema_device=device) for device in ("cpu", "sharded")]
    assert_same(*map(saved_weights, runs))


@pytest.mark.parametrize("towers", [["vit"], ["connector"], ["und"], ["gen"], ["vit", "gen"]], ids=" ".join)
def test_frozen_towers_stay(train, conversations, checkpoint, tmp_path, towers):
    train(train_full, tmp_path, train_data_file=conversations, freeze=towers, vit_dropout=0, adam_weight_decay=0)
    moved = changed(saved_weights(tmp_path), saved_weights(checkpoint))
    moved_towers = {
        tower for tower, pattern in FREEZABLE_PARTS.items() if any(re.match(pattern, name) for name in moved)
    }
    # No gradient goes through a frozen understanding expert to what it sees.
    unmoved = {*towers, "vit", "connector"} if "und" in towers else {*towers}
    assert moved_towers == set(FREEZABLE_PARTS) - unmoved
    assert not BagelPipeline.from_pretrained(tmp_path).transformer.config.freeze_und


def test_tensorboard_has_the_metrics(uninterrupted):
    events = EventAccumulator(str(uninterrupted / "logs" / "bagel")).Reload()
    scalars = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    for name in ("loss", "ce_loss", "mse_loss", "grad_norm", "tokens_per_second", "mfu"):
        assert len(scalars[name]) == 4
        assert all(0 <= value < float("inf") for value in scalars[name])
    for name in ("loss", "tokens_per_second", "mfu"):
        assert min(scalars[name]) > 0
    # One step of warm-up, then half a cosine over three.
    assert scalars["lr"] == pytest.approx([1e-3, 0.75e-3, 0.25e-3, 0], abs=1e-9)
    assert [event.step for event in events.Images("validation/0")] == [1, 2, 3, 4]


def test_utilisation_is_relative_to_the_peak(train, tmp_path):
    ratios = []
    for peak in (1, 4):
        metrics = last_metrics(train(train_full, tmp_path / str(peak), peak_tflops=peak))
        ratios.append(metrics["mfu"] / metrics["tokens_per_second"])
    assert ratios[0] == pytest.approx(4 * ratios[1], rel=1e-4)


def test_validation_answer(train, pictures, tmp_path):
    train(
        train_full,
        tmp_path,
        validation_question="what is this?",
        validation_image=pictures / "red_circle.png",
        validation_steps=1,
        report_to="tensorboard",
    )
    assert names(tmp_path / "validation") == ["step_1.txt", "step_2.txt"]
    answer = (tmp_path / "validation" / "step_2.txt").read_text(encoding="utf-8")
    assert answer.strip()
    events = EventAccumulator(str(tmp_path / "logs" / "bagel")).Reload()
    written = events.Tensors("validation/answer/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert written == answer


def test_saved_folder_draws_the_validation_picture_again(uninterrupted):
    """With the averaged weights."""
    pipe = BagelPipeline.from_pretrained(uninterrupted)
    assert drawn(pipe) == validation_picture(uninterrupted, 4)


def test_card(uninterrupted):
    card = load_card(uninterrupted)
    assert "base_model" not in card.data.to_dict(), "a folder of this machine"
    assert card.data.library_name == "diffusers"
    widgets = [(widget["text"], widget["output"]["url"]) for widget in card.data.widget]
    assert widgets == [(PROMPT, "validation/step_4_0.png")]
    Image.open(uninterrupted / widgets[0][1]).verify()
    assert "trained for 4 steps on 8 samples (messages)" in card.text
    for line in ("gradient_accumulation_steps: 2", "learning_rate: 0.001", "lr_scheduler: cosine", "seed: 0"):
        assert f"- {line}\n" in card.text
    assert f'BagelPipeline.from_pretrained("{uninterrupted}")' in card.text
    assert f"![{PROMPT}](validation/step_4_0.png)" in card.text
    variables = run_snippets(card.text)
    assert (
        variables["picture"].size == (128, 128)
        and variables["ids"].shape[1] > variables["inputs"]["input_ids"].shape[1]
    )


def test_card_shows_no_pictures_of_an_earlier_run(train, tmp_path):
    train(train_full, tmp_path, validation_prompt=PROMPT)
    train(train_full, tmp_path, overwrite_output_dir=True)
    assert "widget" not in load_card(tmp_path).data.to_dict()


def test_gradient_checkpointing_changes_nothing_but_the_work(train, conversations, tmp_path):
    settings = {"train_data_file": conversations, "max_train_steps": 3}
    runs, calls = [], []
    for on in (False, True):
        with counted_calls("MLP") as count:
            runs.append(train(train_full, tmp_path / str(on), **settings, gradient_checkpointing=on))
        calls += count
    assert_same(*map(saved_weights, runs))
    assert calls[1] > 1.5 * calls[0] > 0


def test_accumulation_is_the_same_batch_in_parts(train, conversations, tmp_path):
    """The loss is a mean over all tokens of the step, not a mean of means."""
    runs = [
        train(
            train_full,
            tmp_path / str(size),
            train_data_file=conversations,
            **{"train_batch_size": size, "gradient_accumulation_steps": 4 // size},
        )
        for size in (1, 4)
    ]
    apart, together = map(last_metrics, runs)
    for name in ("loss", "ce_loss", "mse_loss", "grad_norm"):
        assert apart[name] == pytest.approx(together[name], rel=1e-4)


def test_few_steps_of_the_base_are_left_out_aloud(train, checkpoint, tmp_path, caplog):
    """A training that knows nothing of them would not keep them right."""
    pipe = BagelPipeline.from_pretrained(checkpoint)
    pipe.transformer.config.few_steps = FewSteps(3, [1.0, 0.6, 0.3], 1.0, 1.0, 3.0).merged()
    pipe.save_pretrained(tmp_path / "base")
    train(train_full, tmp_path / "out", pretrained_model_name_or_path=tmp_path / "base", max_train_steps=1)
    assert "The model draws in 3 steps, of an adapter that is in its weights" in caplog.text
    assert BagelConfig.from_pretrained(tmp_path / "out" / "transformer").few_steps is None


def test_epochs_instead_of_steps(train, tmp_path):
    train(train_full, tmp_path, max_train_steps=None, num_train_epochs=2, train_batch_size=3)
    assert last_metrics(tmp_path)["step"] == 6


def test_fp16_is_refused_on_the_cpu(train, tmp_path):
    with pytest.raises(ValueError, match="fp16"):
        train(train_full, tmp_path, mixed_precision="fp16")


def test_bf16_trains_float32_weights(train, plain, tmp_path):
    train(train_full, tmp_path, mixed_precision="bf16")
    weights = saved_weights(tmp_path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert changed(weights, saved_weights(plain))
    assert last_metrics(tmp_path)["loss"] == pytest.approx(last_metrics(plain)["loss"], rel=0.02)


def test_sharding_of_one_process_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="accelerate launch"):
        train(train_full, tmp_path, fsdp=True)


def test_reports_to_none(plain):
    # Nothing to draw or to answer makes no folder either.
    assert names(plain) == ["README.md", "model_index.json", "processor", "scheduler", "transformer", "vae"]


def test_resolution_is_not_saved(train, checkpoint, tmp_path):
    # Or the tuned model would take no larger images for good.
    train(train_full, tmp_path, resolution=32)
    sizes = [BagelProcessor.from_pretrained(folder / "processor") for folder in (checkpoint, tmp_path)]
    assert sizes[0].image_processor.vae_size == sizes[1].image_processor.vae_size


def test_weights_are_saved_before_the_last_validation(train, tmp_path, monkeypatch):
    # Drawing takes memory that a training did not, so it may fail.
    monkeypatch.setattr(Validation, "_images", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(train_full, tmp_path, validation_prompt=PROMPT)
    assert drawn(BagelPipeline.from_pretrained(tmp_path))
