"""Muon and AdamW as one optimizer, and what else a training of a small model asks of the scripts."""

from __future__ import annotations

import copy

import pytest
import torch
import train_full
from bagel_training.loop import make_scheduler
from bagel_training.muon import MuonWithAdamW, split_parameters
from torch import nn

from tests.examples.conftest import assert_same, checkpoint_state, saved_weights


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def gradients(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def test_matrices_of_layers_are_for_muon():
    model = small_model()
    matrices, others = split_parameters(model, not_for_muon=("3",))
    assert [tuple(matrix.shape) for matrix in matrices] == [(6, 4)]
    assert {tuple(parameter.shape) for parameter in others} == {(5, 4), (6,), (3, 6), (3,)}
    model[1].weight.requires_grad_(False)
    assert split_parameters(model, ("3",))[0] == []


def test_each_part_does_what_torch_does_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    together, alone = small_model(), small_model()
    optimizer = MuonWithAdamW(*split_parameters(together), lr=0.01, weight_decay=0.1)
    matrices, others = split_parameters(alone)
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, betas=(0.9, 0.98))
    for step in range(3):
        gradients(together, step)
        gradients(alone, step)
        for part in (optimizer, muon, adamw):
            part.step()
    assert_same(together.state_dict(), alone.state_dict())


def test_updates_are_made_orthogonal_in_float32_where_bfloat16_is_slow(monkeypatch):
    """Up to the rounding of bfloat16 they are the same."""
    updates = {}
    for capability in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        torch.manual_seed(0)
        matrix = nn.Parameter(torch.zeros(24, 16))
        optimizer = MuonWithAdamW([matrix], [], lr=1.0)
        for _ in range(2):
            matrix.grad = torch.randn(24, 16)
            given = matrix.grad.clone()
            optimizer.step()
            assert torch.equal(matrix.grad, given)
        updates[capability] = matrix.detach().clone()
    difference = (updates["AVX2"] - updates["AVX512"]).norm() / updates["AVX512"].norm()
    assert 0 < difference < 0.02
    assert not torch.equal(updates["AVX2"], updates["AVX2"].bfloat16().float())


def test_a_convolution_is_a_matrix():
    kernel, matrix = nn.Conv2d(3, 8, 2), nn.Linear(12, 8)
    matrix.weight.data = kernel.weight.data.flatten(1).clone()
    for layer in (kernel, matrix):
        optimizer = MuonWithAdamW(*split_parameters(layer), lr=0.01)
        gradients(layer, 0)
        optimizer.step()
        optimizer.zero_grad()
        assert layer.weight.grad is None
    assert torch.equal(kernel.weight.flatten(1), matrix.weight)


def test_a_saved_state_goes_on():
    whole = small_model()
    optimizer = MuonWithAdamW(*split_parameters(whole), lr=0.01)
    for step in range(4):
        if step == 2:
            resumed = small_model()
            resumed.load_state_dict(whole.state_dict())
            state = copy.deepcopy(optimizer.state_dict())
            other = MuonWithAdamW(*split_parameters(resumed), lr=0.5)
            other.load_state_dict(state)
        gradients(whole, step)
        optimizer.step()
    for step in (2, 3):
        gradients(resumed, step)
        other.step()
    assert_same(resumed.state_dict(), whole.state_dict())


def test_a_schedule_reaches_both_parts():
    model = small_model()
    optimizer = MuonWithAdamW(*split_parameters(model), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients(model, 0)
    optimizer.step()
    schedule.step()
    assert_same(model.state_dict(), before)


def test_stable_rates_fall_at_the_end():
    args = train_full.parse_args(
        [
            "--pretrained_model_name_or_path",
            "model",
            "--instance_data_dir",
            "data",
            "--output_dir",
            "out",
            "--lr_scheduler",
            "warmup_stable_decay",
            "--lr_warmup_steps",
            "2",
            "--lr_decay_steps",
            "4",
        ]
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_scheduler(args, optimizer, num_steps=10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_a_resumed_training_with_muon_is_the_uninterrupted_one(train, conversations, tmp_path):
    settings = {
        "train_data_file": conversations,
        "optimizer": "muon",
        "sdpa_backend": "math",
        "noised_copies": 2,
        "lr_scheduler": "warmup_stable_decay",
        "lr_decay_steps": 2,
        "checkpointing_steps": 2,
    }
    whole = train(train_full, tmp_path / "whole", max_train_steps=4, **settings)
    # Begun with more steps: until the rate falls, the course does not depend on how many there are.
    train(train_full, tmp_path / "parts", **(settings | {"max_train_steps": 2, "lr_decay_steps": 0}))
    parts = train(train_full, tmp_path / "parts", max_train_steps=4, resume_from_checkpoint="latest", **settings)
    assert_same(saved_weights(parts), saved_weights(whole))
    assert_same(checkpoint_state(parts / "checkpoint-4"), checkpoint_state(whole / "checkpoint-4"))


@pytest.mark.parametrize("other", ["--use_8bit_adam", "--fsdp"])
def test_muon_needs_whole_matrices(other, capsys):
    with pytest.raises(SystemExit):
        train_full.parse_args(
            ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "x", "--output_dir", "x"]
            + ["--optimizer", "muon", other]
        )
    assert "--optimizer muon" in capsys.readouterr().err


@pytest.mark.parametrize("only", ["matrices", "others"])
def test_either_part_may_be_empty(only):
    model = small_model()
    matrices, others = split_parameters(model)
    optimizer = MuonWithAdamW(
        matrices if only == "matrices" else [], others if only == "others" else [], lr=0.1, weight_decay=0.1
    )
    before = [parameter.clone() for parameter in model.parameters()]
    gradients(model, 0)
    optimizer.step()
    moved = {
        parameter for parameter, old in zip(model.parameters(), before, strict=True) if not torch.equal(parameter, old)
    }
    assert moved == set(matrices if only == "matrices" else others)
