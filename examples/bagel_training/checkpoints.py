# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are there whole or not at all, and from which a training goes on as if it had not stopped."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict


logger = get_logger(__name__)

# Frozen weights stay in the model that the training began with.
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    own_state: dict[str, Any],
    limit: int | None,
    export: Callable[[Path], None] | None,
) -> Path:
    """
    Write `checkpoint-STEP`, and only then delete the oldest beyond the limit.

    Args:
        accelerator (`Accelerator`)
        output_dir (`Path`): Where the checkpoints are.
        step (`int`): Steps done.
        model, optimizer: What is trained; sharded or not.
        own_state (`dict[str, Any]`): What each rank keeps for itself.
        limit (`int`, *optional*): How many checkpoints to keep.
        export (`Callable[[Path], None]`, *optional*): Writes into the folder what inference loads.
    """
    unfinished = output_dir / f".checkpoint-{step}.unfinished"
    path = output_dir / f"checkpoint-{step}"
    # Half a checkpoint must not bear a checkpoint's name, so each is renamed before it is deleted.
    deleted = output_dir / ".checkpoint-deleted"
    if accelerator.is_main_process:
        for leftover in (unfinished, deleted):
            shutil.rmtree(leftover, ignore_errors=True)
            leftover.mkdir(parents=True)
    accelerator.wait_for_everyone()
    weights, moments = get_state_dict(model, _unwrapped(optimizer), options=TRAINED_ONLY)
    alone = accelerator.num_processes == 1
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=unfinished / "weights", no_dist=alone)
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    own_state = own_state | {"random": _random_state(), "scaler": scaler}
    torch.save(own_state, unfinished / f"rank_{accelerator.process_index}.pt")
    if export is not None and accelerator.is_main_process:
        export(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if path.exists():
            os.replace(path, deleted / path.name)
        os.replace(unfinished, path)
        others = [other for other in reversed(checkpoints(output_dir)) if other != path]
        for old in others[limit - 1 :] if limit else []:
            os.replace(old, deleted / old.name)
        shutil.rmtree(deleted)
    accelerator.wait_for_everyone()
    logger.info(f"Saved {path}")
    return path


def load_checkpoint(
    accelerator: Accelerator, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint, and return what this rank kept for itself.

    Raises:
        ValueError: if the checkpoint was written by another number of processes.
    """
    own = path / f"rank_{accelerator.process_index}.pt"
    if len(list(path.glob("rank_*.pt"))) != accelerator.num_processes:
        raise ValueError(
            f"'{path}' was written by {len(list(path.glob('rank_*.pt')))} processes, but this training has "
            f"{accelerator.num_processes}. A training goes on with as many processes as it began with."
        )
    optimizer = _unwrapped(optimizer)
    weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=path / "weights", no_dist=accelerator.num_processes == 1)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINED_ONLY,
    )
    own_state = torch.load(own, weights_only=True)
    _set_random_state(own_state["random"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(own_state["scaler"])
    logger.info(f"Went on from {path}")
    return own_state


def checkpoints(output_dir: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names.

    Raises:
        FileNotFoundError: if a folder is named that is none.
    """
    if not args.resume_from_checkpoint:
        return None
    if args.resume_from_checkpoint == "latest":
        found = checkpoints(Path(args.output_dir))
        if not found:
            logger.info(f"There is no checkpoint in {args.output_dir}: starting from the beginning.")
        return found[-1] if found else None
    path = Path(args.resume_from_checkpoint)
    if not path.is_dir():
        path = Path(args.output_dir) / args.resume_from_checkpoint
    if not path.is_dir():
        raise FileNotFoundError(f"--resume_from_checkpoint: there is no folder '{args.resume_from_checkpoint}'.")
    return path


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer in accelerate's wrapper, whose steps would go through the scaler of float16."""
    return getattr(optimizer, "optimizer", optimizer)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
