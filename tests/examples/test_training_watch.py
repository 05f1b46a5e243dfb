"""Steps and weights that are not finite: left out, counted, never saved."""

from __future__ import annotations

import logging

import pytest
import torch
import train_full
import train_lora
from accelerate import Accelerator

from tests.examples.conftest import (
    assert_same,
    card_text,
    changed,
    checkpoint_state,
    checkpoints,
    not_finite,
    saved_weights,
    write_lines,
)


@pytest.fixture
def told(caplog):
    """`told("Left out")`: what was logged that begins so."""
    caplog.set_level(logging.INFO)

    def find(start: str) -> list[str]:
        lines = (record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records)
        return [line for line in lines if line.startswith(start)]

    return find


@pytest.mark.parametrize("part", ["loss", "gradient"])
@pytest.mark.parametrize(
    "script, settings",
    [(train_full, {"ema": True}), (train_full, {"optimizer": "muon"}), (train_lora, {"rank": 2})],
    ids=["average", "muon", "lora"],
)
def test_a_step_that_is_not_finite_leaves_no_trace(train, tmp_path, told, script, settings, part):
    once = train(script, tmp_path / "once", **settings, max_train_steps=1)
    with not_finite(2, part=part):
        train(script, tmp_path / "two", **settings)
    assert_same(saved_weights(tmp_path / "two"), saved_weights(once))
    (warning,) = told("Left out step")
    assert warning.startswith("Left out step 2, which was not finite: loss ")
    assert warning.count("sample ") == 2 and ".png" in warning


def test_the_place_in_the_data_and_the_schedule_move_on(train, tmp_path):
    settings = {"max_train_steps": 4, "checkpointing_steps": 2, "lr_scheduler": "linear", "ema": True}
    whole = train(train_full, tmp_path / "whole", **settings)
    with not_finite(2):
        train(train_full, tmp_path / "bad", **settings)
    # The checkpoint that was due waits for weights that are known to be good.
    assert checkpoints(tmp_path / "bad") == ["checkpoint-3", "checkpoint-4"]
    own, expected = (torch.load(run / "checkpoint-4" / "rank_0.pt") for run in (tmp_path / "bad", whole))
    assert own["loader"] == expected["loader"]
    assert own["scheduler"]["last_epoch"] == 4 and own["scheduler"]["_last_lr"] == expected["scheduler"]["_last_lr"]
    assert own["ema"]["optimization_step"] == 3


@pytest.mark.parametrize("script", [train_full, train_lora], ids=lambda script: script.__name__)
def test_too_many_in_a_row_end_the_training_and_spare_the_last_checkpoint(train, tmp_path, script):
    settings = {"max_train_steps": 9, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "rank": None}
    settings |= {"rank": 2} if script is train_lora else {}
    with (
        pytest.raises(FloatingPointError, match=r"Step 6 was not finite \(loss nan.*--max_nonfinite_steps"),
        not_finite(2, 4, 5, 6, 7, 8, 9),
    ):
        train(script, tmp_path, **settings, max_nonfinite_steps=2)
    # What it replaces is kept until a step has shown that it is good.
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    assert all(tensor.isfinite().all() for tensor in checkpoint_state(tmp_path / "checkpoint-3").values())
    assert not (tmp_path / "README.md").exists()
    train(script, tmp_path, **settings | {"max_train_steps": 4}, resume_from_checkpoint="latest")
    assert checkpoints(tmp_path) == ["checkpoint-4"]
    assert "Steps that were not finite: 1, " in card_text(tmp_path)


@pytest.mark.parametrize(
    "steps, due, message",
    [
        (4, 2, "checkpoint-2 is not written: "),
        (4, 9, "Step 3 has the loss nan, since"),
        (2, 9, "model is not saved: "),
    ],
    ids=["checkpoint", "step", "end"],
)
def test_broken_weights_are_never_saved(train, tmp_path, monkeypatch, steps, due, message):
    update = torch.optim.AdamW.step

    def breaking(self, closure=None):
        update(self, closure)
        parameter = self.param_groups[0]["params"][3]
        if self.state[parameter]["step"] == 2:
            parameter.detach().view(-1)[0] = float("inf")

    train(train_full, tmp_path, max_train_steps=1, checkpointing_steps=1)
    kept = checkpoint_state(tmp_path / "checkpoint-1")
    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)
    settings = {"checkpointing_steps": due, "checkpoints_total_limit": 1, "max_nonfinite_steps": 99}
    with pytest.raises(FloatingPointError, match=message) as stopped:
        train(train_full, tmp_path, max_train_steps=steps, resume_from_checkpoint="latest", **settings)
    assert "model." in str(stopped.value)
    assert checkpoints(tmp_path) == ["checkpoint-1"]
    assert_same(checkpoint_state(tmp_path / "checkpoint-1"), kept)
    assert all(tensor.isfinite().all() for tensor in saved_weights(tmp_path).values())


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_broken_moments_are_never_saved(train, tmp_path, monkeypatch, moment):
    update = torch.optim.AdamW.step

    def breaking(self, closure=None):
        update(self, closure)
        self.state[self.param_groups[0]["params"][0]][moment].view(-1)[0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)
    with pytest.raises(FloatingPointError, match=rf"checkpoint-1 is not written: .*\.{moment} holds NaN"):
        train(train_full, tmp_path, checkpointing_steps=1)
    assert not checkpoints(tmp_path)


def test_a_training_without_an_update_saves_nothing(train, tmp_path):
    with pytest.raises(FloatingPointError, match="None of the 2 steps was finite"), not_finite(1, 2):
        train(train_lora, tmp_path, rank=2)
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


@pytest.fixture
def scaled(monkeypatch):
    """Trainings whose gradients are scaled as float16's are, from 8 on."""

    def make_accelerator(args, make=train_full.make_accelerator):
        accelerator = make(args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        return accelerator

    monkeypatch.setattr(train_full, "make_accelerator", make_accelerator)
    # accelerate does it for float16 alone, which a CPU has not.
    monkeypatch.setattr(
        Accelerator, "unscale_gradients", lambda self, optimizer: self.scaler.unscale_(optimizer.optimizer)
    )


def test_overflows_by_which_float16_finds_its_scale_do_not_count(train, scaled, tmp_path, told):
    with not_finite(1, 2, 3, part="gradient"):
        train(train_full, tmp_path, max_train_steps=5, checkpointing_steps=5, max_nonfinite_steps=0)
    own = torch.load(tmp_path / "checkpoint-5" / "rank_0.pt")
    assert own["scaler"]["scale"] == 1 and own["watch"]["num_steps"] == 0
    state = checkpoint_state(tmp_path / "checkpoint-5")
    assert {int(value) for place, value in state.items() if place.endswith("/step")} == {2}
    assert not told("Left out step")


def test_overflows_at_any_scale_count(train, scaled, tmp_path):
    with pytest.raises(FloatingPointError, match="Step 4 was not finite"), not_finite(*range(9), part="gradient"):
        train(train_full, tmp_path, max_train_steps=9, max_nonfinite_steps=0)


def test_a_loss_that_is_not_finite_counts_under_a_scale(train, scaled, tmp_path, told):
    with not_finite(2):
        train(train_full, tmp_path, max_train_steps=3)
    assert len(told("Left out step 2")) == 1


def test_a_run_ends_with_what_it_left_out(train, pictures, tmp_path, told):
    rows = [{"id": name, "image": str(pictures / f"{name}.png"), "text": "a"} for name in ("red_circle", "red_square")]
    rows.insert(1, {"id": "lost", "image": "lost.png", "text": "a"})
    source = write_lines(tmp_path / "rows.jsonl", rows)
    settings = {"max_train_steps": 4, "checkpointing_steps": 3, "on_error": "skip", "train_data_file": [source]}
    settings |= {"rank": 2, "gradient_accumulation_steps": 2}
    with not_finite(2, accumulation=2):
        train(train_lora, tmp_path / "run", **settings)
    train(train_lora, tmp_path / "run", **settings, resume_from_checkpoint="checkpoint-3")
    ends = told("End of the training. ")
    assert len(ends) == 2
    for text in (*ends, card_text(tmp_path / "run")):
        assert "Samples left out: 1 (sample 1 (id 'lost')). Steps that were not finite: 1, " in text
    train(train_lora, tmp_path / "whole", rank=2)
    assert told("End of the training. ")[-1] == "End of the training. Nothing was left out."


@pytest.mark.parametrize("script", [train_full, train_lora], ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    "name, value",
    [
        ("max_grad_norm", "nan"),
        ("max_grad_norm", -1),
        ("learning_rate", 1e30),
        ("learning_rate", "nan"),
        ("learning_rate", -1e-4),
        ("adam_beta1", 1),
        ("adam_beta2", "nan"),
        ("adam_epsilon", 0),
        ("adam_weight_decay", "inf"),
        ("mse_weight", "nan"),
        ("logit_mean", "inf"),
        ("timestep_shift", 0),
        ("text_dropout", 1.5),
        ("max_nonfinite_steps", -1),
    ],
)
def test_numbers_that_cannot_work_are_refused(script, name, value, capsys, tmp_path):
    words = ["--pretrained_model_name_or_path", "a", "--output_dir", str(tmp_path), "--instance_data_dir", "c"]
    with pytest.raises(SystemExit):
        script.parse_args([*words, f"--{name}={value}"])
    assert f"--{name} must be " in capsys.readouterr().err


def test_no_clipping_is_a_norm_without_end(train, tmp_path):
    runs = [train(train_lora, tmp_path / norm, rank=2, max_grad_norm=norm) for norm in ("inf", "1e6", "1e-3")]
    assert_same(*map(saved_weights, runs[:2]))
    assert changed(saved_weights(runs[2]), saved_weights(runs[0]))
