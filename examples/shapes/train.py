# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Train bagel-shapes from nothing: `python examples/shapes/train.py --output_dir shapes`.

Four stages, each kept when it is finished: the VAE on one core, the vision tower and then the understanding expert on the
other, and the whole model on both. Killed and started again, the command goes on where it last saved. See
docs/shapes.md.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from dataset import write_dataset
from diffusers import AutoencoderKL
from parts import MIXED_PRECISION, TIMESTEP_SHIFT, copy_expert, new_model, new_pipeline
from tasks import JOINT, UNDERSTANDING
from tokenizer import train_tokenizer
from train_vae import new_vae, train_vae
from train_vit import train_vit

from diffusers_bagel import BagelPipeline
from transformers_bagel.modeling_bagel import BagelVisionModel


TRAIN_FULL = Path(__file__).parent.parent / "train_full.py"
# `--multi_gpu` starts processes on CPUs too; port 0 is any that is free.
LAUNCHER = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_machines",
    "1",
    "--mixed_precision",
    MIXED_PRECISION,
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]
# Written one by one, so that a killed run has not to write all of them again.
JOINT_FILES = 4
SETTINGS = [
    "--cpu",
    "--mixed_precision",
    MIXED_PRECISION,
    "--optimizer",
    "muon",
    "--learning_rate",
    "3e-3",
    "--adam_weight_decay",
    "0",
    "--lr_warmup_steps",
    "30",
    "--ema",
    "--ema_decay",
    "0.998",
    "--checkpointing_steps",
    "100",
    "--checkpoints_total_limit",
    "2",
    "--resume_from_checkpoint",
    "latest",
    "--validation_steps",
    "0",
    "--logging_steps",
    "10",
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="keeps the stages, and at the end `repository`")
    parser.add_argument("--num_processes", type=int, default=2, help="of the last stage, one core each")
    parser.add_argument("--vae_steps", type=int, default=11_000)
    parser.add_argument("--vit_steps", type=int, default=1200)
    parser.add_argument("--understanding_steps", type=int, default=1000)
    parser.add_argument("--joint_steps", type=int, default=4000)
    parser.add_argument("--joint_decay_steps", type=int, default=1000, help="the last ones, whose learning rate falls")
    parser.add_argument("--understanding_samples", type=int, default=40_000)
    parser.add_argument("--joint_samples", type=int, default=40_000, help="in each of four files")
    args = parser.parse_args(arguments)
    for name, count in vars(args).items():
        if name != "output_dir" and count < 1:
            parser.error(f"--{name} must be at least 1, got {count}.")
    folder = Path(args.output_dir)
    # A daemon ends if a stage here fails.
    vae = multiprocessing.get_context("spawn").Process(
        target=vae_stage, args=(folder / "vae", args.vae_steps), daemon=True
    )
    vae.start()
    torch.set_num_threads(1)
    stage(folder / "vit", lambda part: train_vit(part, args.vit_steps).save_pretrained(part / "model"))
    stage(folder / "understanding", lambda part: train_understanding(part, args))
    vae.join()
    if vae.exitcode:
        raise RuntimeError(f"The VAE's training ended with exit code {vae.exitcode}; its error is above.")
    stage(folder / "joint", lambda part: train_joint(part, args))
    stage(folder / "repository", lambda part: save_repository(folder / "joint" / "training", part))


def end_with_parent() -> None:
    """Let this process end when the one that started it is killed, so that the next run finds nobody at work. Linux can do
    that; elsewhere a run has to be ended whole.
    """
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


def vae_stage(folder: Path, num_steps: int) -> None:
    """One thread, here as in the other stages: it keeps a run's numbers the same however many cores there are."""
    end_with_parent()
    torch.set_num_threads(1)
    stage(folder, lambda part: train_vae(part, num_steps).save_pretrained(part / "model"))


def stage(folder: Path, run: Callable[[Path], object]) -> None:
    """Run what fills FOLDER, unless it is there: it bears its name only when it is finished."""
    if folder.exists():
        print(f"{folder} is finished.")
        return
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    run(part)
    os.replace(part, folder)


def train_understanding(part: Path, args: argparse.Namespace) -> None:
    """Questions, descriptions and plans, from scratch around the frozen tower."""
    start, data = part / "start", part / "data.parquet"
    if not start.exists():
        tower = BagelVisionModel.from_pretrained(part.parent / "vit" / "model")
        tokenizer = train_tokenizer()
        # Nothing is drawn yet, so any VAE will do.
        save_whole(new_pipeline(new_model(tokenizer, tower), tokenizer, new_vae()), start)
    if not data.exists():
        write_dataset(data, 1, UNDERSTANDING, args.understanding_samples)
    train_full(
        1, start, part / "training", [data],
        "--freeze", "vit", "gen", "--max_tokens", "4096", "--lr_scheduler", "linear",
        "--max_train_steps", str(args.understanding_steps),
    )  # fmt: skip


def train_joint(part: Path, args: argparse.Namespace) -> None:
    """Everything, but for the tower; the generation expert starts as a copy of the understanding one."""
    start, data = part / "start", [part / f"data-{index}.parquet" for index in range(JOINT_FILES)]
    if not start.exists():
        vae = AutoencoderKL.from_pretrained(part.parent / "vae" / "model")
        pipe = BagelPipeline.from_pretrained(part.parent / "understanding" / "training", vae=vae)
        copy_expert(pipe.transformer)
        save_whole(pipe, start)
    for index, file in enumerate(data):
        if not file.exists():
            write_dataset(file, 2 + index, JOINT, args.joint_samples)
    train_full(
        args.num_processes, start, part / "training", data,
        "--freeze", "vit", "--max_tokens", "6000", "--noised_copies", "4", "--cache_latents",
        "--sdpa_backend", "math", "--adam_beta2", "0.98", "--timestep_shift", str(TIMESTEP_SHIFT),
        "--text_dropout", "0.1", "--vit_dropout", "0.3", "--vae_dropout", "0.1",
        "--lr_scheduler", "warmup_stable_decay", "--lr_decay_steps", str(args.joint_decay_steps),
        "--max_train_steps", str(args.joint_steps),
    )  # fmt: skip


def save_whole(pipe: BagelPipeline, folder: Path) -> None:
    """Save a pipeline under a name that it bears only when all of it is written."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    pipe.save_pretrained(unfinished)
    os.replace(unfinished, folder)


def save_repository(trained: Path, part: Path) -> None:
    """The Hub's layout: model and processor at the root, so that both libraries read one copy."""
    pipe = BagelPipeline.from_pretrained(trained)
    for saved in (pipe, pipe.vae):
        # Not the folder in which it was trained.
        saved.register_to_config(_name_or_path="bagel-shapes")
    pipe.transformer.save_pretrained(part)
    pipe.processor.save_pretrained(part)
    pipe.vae.save_pretrained(part / "vae")
    pipe.scheduler.save_pretrained(part / "scheduler")
    pipe.save_config(part)


def train_full(num_processes: int, start: Path, output: Path, data: list[Path], *settings: str) -> None:
    """Run this project's training script in processes of a core each."""
    launcher = [] if num_processes == 1 else [*LAUNCHER, "--num_processes", str(num_processes)]
    inputs = ["--pretrained_model_name_or_path", str(start), "--output_dir", str(output)]
    inputs += ["--train_data_file", *map(str, data)]
    subprocess.run(
        [sys.executable, *launcher, str(TRAIN_FULL), *inputs, *SETTINGS, *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=end_with_parent,
        check=True,
    )


if __name__ == "__main__":
    main()
