# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Train bagel-shapes from nothing: `python examples/shapes/train.py --output_dir shapes`.

Seven stages, each kept when it is finished: the VAE on one core, the vision tower and then the understanding expert on the
other, and the whole model on both: everything at once, then conversations in which it decides what to answer with, then
longer ones and thoughts before answers, and everything again. Killed and started again, the command goes on where it last
saved. See docs/shapes.md.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from dataset import write_dataset
from diffusers import AutoencoderKL
from parts import MIXED_PRECISION, TIMESTEP_SHIFT, copy_expert, new_model, new_pipeline
from tasks import DECIDING, JOINT, REFINING, THINKING, UNDERSTANDING, sample
from tokenizer import train_tokenizer
from train_vae import new_vae, train_vae
from train_vit import train_vit

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelDataCollator
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
# Tokens of a step, over all processes.
UNDERSTANDING_TOKENS, JOINT_TOKENS, DECIDING_TOKENS = 4096, 12_000, 8_000
# Of the last stage in the shipped weights, the rest of which are those of the deciding one.
LAST_SHARE = 0.7
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
# Of the stages that draw.
DRAWING = [
    "--freeze",
    "vit",
    "--noised_copies",
    "4",
    "--cache_latents",
    "--sdpa_backend",
    "math",
    "--adam_beta2",
    "0.98",
    "--timestep_shift",
    str(TIMESTEP_SHIFT),
    "--text_dropout",
    "0.1",
    "--vit_dropout",
    "0.3",
    "--vae_dropout",
    "0.1",
    "--lr_scheduler",
    "warmup_stable_decay",
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="keeps the stages, and at the end `repository`")
    parser.add_argument("--num_processes", type=int, default=2, help="of the last four stages, one core each")
    parser.add_argument("--vae_steps", type=int, default=11_000)
    parser.add_argument("--vit_steps", type=int, default=1200)
    parser.add_argument("--understanding_steps", type=int, default=1000)
    parser.add_argument("--joint_steps", type=int, default=4000)
    parser.add_argument("--joint_decay_steps", type=int, default=1000, help="the last ones, whose learning rate falls")
    parser.add_argument("--deciding_steps", type=int, default=1700)
    parser.add_argument("--deciding_decay_steps", type=int, default=600)
    # Whose learning rate falls from the first step on.
    parser.add_argument("--thinking_steps", type=int, default=400)
    parser.add_argument("--refining_steps", type=int, default=300)
    parser.add_argument("--understanding_samples", type=int, default=40_000)
    parser.add_argument("--joint_samples", type=int, default=40_000, help="in each of four files")
    parser.add_argument("--deciding_samples", type=int, default=4000, help="in each of eight files")
    parser.add_argument("--thinking_samples", type=int, default=4000, help="in each of three files")
    parser.add_argument("--refining_samples", type=int, default=4000, help="in each of two files")
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
    stage(folder / "deciding", lambda part: train_deciding(part, args))
    stage(folder / "thinking", lambda part: train_thinking(part, args))
    stage(folder / "refining", lambda part: train_refining(part, args))
    trained = [folder / name / "training" for name in ("deciding", "refining")]
    stage(folder / "repository", lambda part: save_repository(*trained, part))


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
    start = part / "start"
    if not start.exists():
        tower = BagelVisionModel.from_pretrained(part.parent / "vit" / "model")
        tokenizer = train_tokenizer()
        # Nothing is drawn yet, so any VAE will do.
        save_whole(new_pipeline(new_model(tokenizer, tower), tokenizer, new_vae()), start)
    data = write_data(part, [1], UNDERSTANDING, args.understanding_samples)
    train_full(
        1, UNDERSTANDING_TOKENS, start, part / "training", data,
        "--freeze", "vit", "gen", "--next_action", "none",
        "--lr_scheduler", "linear", "--max_train_steps", str(args.understanding_steps),
    )  # fmt: skip


def train_joint(part: Path, args: argparse.Namespace) -> None:
    """Everything, but for the tower; the generation expert starts as a copy of the understanding one."""
    start = part / "start"
    if not start.exists():
        vae = AutoencoderKL.from_pretrained(part.parent / "vae" / "model")
        pipe = BagelPipeline.from_pretrained(part.parent / "understanding" / "training", vae=vae)
        copy_expert(pipe.transformer)
        save_whole(pipe, start)
    data = write_data(part, range(2, 6), JOINT, args.joint_samples, start)
    train_full(
        args.num_processes, JOINT_TOKENS, start, part / "training", data,
        *DRAWING, "--next_action", "none", "--lr_decay_steps", str(args.joint_decay_steps),
        "--max_train_steps", str(args.joint_steps),
    )  # fmt: skip


def train_deciding(part: Path, args: argparse.Namespace) -> None:
    """The same in conversations: what is answered with, in words and pictures in turn."""
    start = part.parent / "joint" / "training"
    data = write_data(part, range(6, 14), DECIDING, args.deciding_samples, start)
    train_full(
        args.num_processes, DECIDING_TOKENS, start, part / "training", data,
        *DRAWING, "--next_action", "all", "--learning_rate", "2e-3", "--lr_decay_steps", str(args.deciding_decay_steps),
        "--max_train_steps", str(args.deciding_steps),
    )  # fmt: skip


def train_thinking(part: Path, args: argparse.Namespace) -> None:
    """Thoughts before answers, and what is asked behind answers of words and pictures, which no stage before had much of."""
    start = part.parent / "deciding" / "training"
    data = write_data(part, range(14, 17), THINKING, args.thinking_samples, start)
    train_falling(args, start, part / "training", data, "1.5e-3", args.thinking_steps)


def train_refining(part: Path, args: argparse.Namespace) -> None:
    """Everything again, and most of all what the stage before had least of."""
    start = part.parent / "thinking" / "training"
    data = write_data(part, range(17, 19), REFINING, args.refining_samples, start)
    train_falling(args, start, part / "training", data, "1.2e-3", args.refining_steps)


def train_falling(
    args: argparse.Namespace, start: Path, folder: Path, data: list[Path], learning_rate: str, steps: int
) -> None:
    """A short stage of conversations."""
    train_full(
        args.num_processes, DECIDING_TOKENS, start, folder, data,
        *DRAWING, "--next_action", "all", "--learning_rate", learning_rate, "--lr_scheduler", "linear",
        "--max_train_steps", str(steps),
    )  # fmt: skip


def write_data(
    part: Path, seeds: Sequence[int], shares: dict[str, float], num_samples: int, start: Path | None = None
) -> list[Path]:
    """The samples of a stage, a file a seed, which all cores write; of a stage that draws also the latents of its pictures,
    which the training finds in its folder. A killed command has not to write all of them again.
    """
    files = [part / f"data-{seed}.parquet" for seed in seeds]
    work = [(file, seed, shares, num_samples, start) for file, seed in zip(files, seeds, strict=True)]
    with multiprocessing.get_context("spawn").Pool(min(len(files), os.cpu_count() or 1), end_with_parent) as pool:
        pool.starmap(write_file, work, chunksize=1)
    return files


def write_file(file: Path, seed: int, shares: dict[str, float], num_samples: int, start: Path | None) -> None:
    """One of these files, unless it is there."""
    if file.exists():
        return
    torch.set_num_threads(1)
    if start is not None:
        pipe = BagelPipeline.from_pretrained(start, transformer=None)
        collator = BagelDataCollator(pipe.processor, vae=pipe.vae, cache_dir=file.parent / "training" / "latents")
        for index in range(num_samples):
            collator.with_latents(collator.encode({"messages": sample(seed, shares, index)}, 0))
    write_dataset(file, seed, shares, num_samples)


def save_whole(pipe: BagelPipeline, folder: Path) -> None:
    """Save a pipeline under a name that it bears only when all of it is written."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    pipe.save_pretrained(unfinished)
    os.replace(unfinished, folder)


@torch.no_grad()
def save_repository(before: Path, trained: Path, part: Path) -> None:
    """The Hub's layout: model and processor at the root, so that both libraries read one copy. Its weights lie between those of
    two stages, where what the first one could best and what the last one learned meet.
    """
    pipe = BagelPipeline.from_pretrained(trained)
    weights = BagelPipeline.from_pretrained(before, vae=None).transformer.state_dict()
    for name, weight in pipe.transformer.state_dict().items():
        weight.copy_(weights[name].lerp(weight, LAST_SHARE))
    for saved in (pipe, pipe.vae):
        # Not the folder in which it was trained.
        saved.register_to_config(_name_or_path="bagel-shapes")
    pipe.transformer.save_pretrained(part)
    pipe.processor.save_pretrained(part)
    pipe.vae.save_pretrained(part / "vae")
    pipe.scheduler.save_pretrained(part / "scheduler")
    pipe.save_config(part)


def train_full(
    num_processes: int, num_tokens: int, start: Path, output: Path, data: list[Path], *settings: str
) -> None:
    """Run this project's training script in processes of a core each, which share the tokens of a step."""
    launcher = [] if num_processes == 1 else [*LAUNCHER, "--num_processes", str(num_processes)]
    inputs = ["--pretrained_model_name_or_path", str(start), "--output_dir", str(output)]
    inputs += ["--train_data_file", *map(str, data), "--max_tokens", str(num_tokens // num_processes)]
    subprocess.run(
        [sys.executable, *launcher, str(TRAIN_FULL), *inputs, *SETTINGS, *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=end_with_parent,
        check=True,
    )


if __name__ == "__main__":
    main()
