# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The loop of the stages that train a part alone: the VAE, and the tower that sees."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm


sys.path.append(str(Path(__file__).parent.parent))

from bagel_training.muon import MuonWithAdamW, split_parameters  # noqa: E402


def run_stage(
    folder: Path,
    model: nn.Module,
    loss_of_step: Callable[[int], dict[str, torch.Tensor]],
    num_steps: int,
    learning_rate: float,
    cooldown: float = 0.4,
    not_for_muon: tuple[str, ...] = (),
    save_every: int = 200,
) -> None:
    """
    Train a model; killed and started again it goes on where it last saved. It ends with its averaged weights.

    Args:
        folder (`Path`): Keeps the state and `log.jsonl`.
        model (`nn.Module`)
        loss_of_step (`Callable`): Losses of a step; `loss` is learned, all are logged. Its data follow from the step.
        num_steps (`int`)
        learning_rate (`float`): After a warm-up of 40 steps, until it falls to zero.
        cooldown (`float`): Last share of the steps, in which it falls.
        not_for_muon (`tuple[str, ...]`): Heads, see [`split_parameters`].
        save_every (`int`): Steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    matrices, others = split_parameters(model, not_for_muon)
    optimizer = MuonWithAdamW(matrices, others, learning_rate)
    average = EMAModel(model.parameters(), decay=0.998)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 40, (num_steps - step) / (cooldown * num_steps))
    )
    state_file = folder / "state.pt"
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        step = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        average.load_state_dict(state["average"])
    model.train()
    progress = tqdm(total=num_steps, initial=step, desc=folder.name, mininterval=5)
    while step < num_steps:
        torch.manual_seed(step)
        losses = loss_of_step(step)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.step(model.parameters())
        step += 1
        progress.update()
        if step % 20 == 0:
            values = {name: float(value.detach()) for name, value in losses.items()}
            with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step} | values) + "\n")
            progress.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
        if step % save_every == 0:
            unfinished = state_file.with_suffix(".unfinished")
            torch.save(
                {
                    "step": step,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "average": average.state_dict(),
                },
                unfinished,
            )
            os.replace(unfinished, state_file)
    progress.close()
    average.copy_to(model.parameters())
    model.eval()
