# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are there whole or not at all, and from which a training goes on as if it had not stopped."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from transformers_bagel.errors import some

from .settings import write_settings
from .watch import check_finite


logger = get_logger(__name__)

# Frozen weights stay in the model that the training began with.
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
DELETED = ".checkpoint-deleted"


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    own_state: dict[str, Any],
    settings: dict[str, Any] | None,
    export: Callable[[Path], None] | None,
) -> Path:
    """
    Write `checkpoint-STEP`.

    Args:
        accelerator (`Accelerator`)
        output_dir (`Path`): Where the checkpoints are.
        step (`int`): Steps done.
        model, optimizer: What is trained; sharded or not.
        own_state (`dict[str, Any]`): What each rank keeps for itself.
        settings (`dict[str, Any]`, *optional*): See `settings.py`.
        export (`Callable[[Path], None]`, *optional*): Writes into the folder what inference loads.

    Raises:
        FloatingPointError: if weights, moments or average are not finite; nothing is written then.
    """
    weights, moments = get_state_dict(model, _unwrapped(optimizer), options=TRAINED_ONLY)
    check_finite([weights, moments, own_state], f"checkpoint-{step} is not written")
    unfinished = output_dir / f".checkpoint-{step}.unfinished"
    path = output_dir / f"checkpoint-{step}"
    if accelerator.is_main_process:
        for leftover in (unfinished, output_dir / DELETED):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    alone = accelerator.num_processes == 1
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=unfinished / "weights", no_dist=alone)
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    own_state = own_state | {"random": _random_state(), "scaler": scaler}
    torch.save(own_state, unfinished / f"rank_{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        if settings is not None:
            write_settings(unfinished, settings)
        if export is not None:
            export(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replaced = [path] if path.exists() else []
        _delete(output_dir, replaced, lambda: os.replace(unfinished, path))
    accelerator.wait_for_everyone()
    logger.info(f"Saved {path}")
    return path


def delete_oldest(newest: Path, limit: int) -> None:
    """Delete checkpoints beyond a limit, the oldest first and never the newest, whatever its number."""
    others = [other for other in reversed(checkpoints(newest.parent)) if other != newest]
    _delete(newest.parent, others[limit - 1 :])


def _delete(output_dir: Path, paths: list[Path], then: Callable[[], None] = lambda: None) -> None:
    """Delete folders, after something else. Half a checkpoint must not bear a checkpoint's name, so each is renamed first."""
    deleted = output_dir / DELETED
    deleted.mkdir(exist_ok=True)
    for path in paths:
        os.replace(path, deleted / path.name)
    then()
    shutil.rmtree(deleted)


def load_checkpoint(
    accelerator: Accelerator, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint, and return what this rank kept for itself.

    Raises:
        ValueError: if the checkpoint is broken, was written by another number of processes, or holds other weights than
            those that are trained.
    """
    own = path / f"rank_{accelerator.process_index}.pt"
    num_ranks = len(list(path.glob("rank_*.pt")))
    if not num_ranks:
        raise ValueError(f"--resume_from_checkpoint: '{path}' is no checkpoint of a training, it has no rank_0.pt.")
    if num_ranks != accelerator.num_processes:
        raise ValueError(
            f"'{path}' was written by {num_ranks} processes, but this training has "
            f"{accelerator.num_processes}. A training goes on with as many processes as it began with."
        )
    with _broken(own):
        own_state = torch.load(own, weights_only=True)
    optimizer = _unwrapped(optimizer)
    weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    state = {"model": weights, "optimizer": moments}
    with _broken(path / "weights"):
        saved = dcp.FileSystemReader(path / "weights").read_metadata().state_dict_metadata
    _check_same_weights(path, saved, state)
    with _broken(path / "weights"):
        dcp.load(state, checkpoint_id=path / "weights", no_dist=accelerator.num_processes == 1)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINED_ONLY,
    )
    _set_random_state(own_state["random"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(own_state["scaler"])
    logger.info(f"Went on from {path}")
    return own_state


@contextmanager
def _broken(file: Path) -> Iterator[None]:
    """Whatever the reading of a broken file raises, with the file's name."""
    try:
        yield
    # torch's exception of checkpoints is no `Exception`.
    except (Exception, dcp.CheckpointException) as error:
        cause = error
        if isinstance(error, dcp.CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        others = [path.name for path in checkpoints(file.parent.parent) if path != file.parent]
        raise ValueError(
            f"'{file}' is broken ({type(cause).__name__}: {cause}). Go on from another checkpoint with "
            f"--resume_from_checkpoint; there is {', '.join(others) or 'none beside it'}."
        ) from error


def _check_same_weights(path: Path, saved: dict[str, Any], state: dict[str, Any]) -> None:
    """Refuse a checkpoint of other weights or moments, by their names and sizes."""
    sizes = {
        "model": {f"model.{name}": tensor.shape for name, tensor in state["model"].items()},
        "optimizer.state": {
            f"optimizer.state.{name}.{moment}": tensor.shape
            for name, moments in state["optimizer"]["state"].items()
            for moment, tensor in moments.items()
            if isinstance(tensor, torch.Tensor)
        },
    }
    for part, own in sizes.items():
        kept = {
            name: item.size for name, item in saved.items() if name.startswith(f"{part}.") and hasattr(item, "size")
        }
        if kept == own:
            continue
        differing = sorted(name for name in kept | own if kept.get(name) != own.get(name))
        raise ValueError(
            f"'{path}' holds other weights than this training trains: {some(differing)} "
            f"{'differs' if len(differing) == 1 else 'differ'}. Go on with the settings that it was written with."
        )


def checkpoints(output_dir: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; none if it names `latest` and there is none yet.

    Raises:
        FileNotFoundError: if a folder is named that is none.
    """
    if not args.resume_from_checkpoint:
        return None
    if args.resume_from_checkpoint == "latest":
        found = checkpoints(Path(args.output_dir))
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
