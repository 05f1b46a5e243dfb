# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Writing a repository that both libraries load: the model and the processor at its root, beside `vae/`, `scheduler/` and
`model_index.json`. A run that is killed goes on with the files that it had finished.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from remote_code import write_remote_code
from safe_files import read_json_object
from safetensors.torch import load_file
from sources import INDEX
from streaming import SPARE_BYTES, UNFINISHED, Shard, check_disk_space, verify_shard, write_json, write_shard
from tqdm.auto import tqdm

from diffusers_bagel import BagelPipeline
from transformers_bagel.destinations import destination


TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS_PATTERN = "model{suffix}.safetensors"
CARD = Path(__file__).with_name("repository_card.md")
# What a run is about, while it is unfinished.
STATE = ".conversion.json"


def add_output_arguments(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Arguments of commands that write a repository; `dtype` says what is written without `--dtype`."""
    parser.add_argument(
        "--dtype", type=torch_dtype, metavar=f"{{{','.join(TYPES)}}}", help=f"of the weights; by default {dtype}"
    )
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--repo-id", help="what the card calls the repository; by default the name of DST")
    parser.add_argument(
        "--verify", action="store_true", help="read all values before, and what was written again after"
    )


def torch_dtype(name: str) -> torch.dtype:
    if name not in TYPES:
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(TYPES)})")
    return TYPES[name]


def run(work: Callable[..., None], args: argparse.Namespace) -> int:
    """Do the work of a command with its arguments, and tell its errors as a command does: in a line, and by its exit code."""
    try:
        args.dst = destination(args.dst, "DST")
        work(**vars(args))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        if (args.dst / STATE).exists():
            print("The files that are finished are kept: the same command goes on with the others.", file=sys.stderr)
        return 2
    return 0


def identity(file: Path) -> list[str | int]:
    """What tells a file of weights from another, or from a later one of its name."""
    return [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]


def taken_up(dst: Path) -> Path:
    """DST as [`destination`] finds it, if it is free or holds a run that is not finished.

    Raises:
        OSError: if it holds anything else, or cannot be made.
    """
    dst = destination(dst, "DST")
    state = dst / STATE
    unborn = state.with_name(STATE + UNFINISHED)
    if dst.exists() and not state.exists() and any(file != unborn for file in dst.iterdir()):
        raise FileExistsError(f"'{dst}' is not empty. Name a new folder.")
    return dst


def prepare(dst: Path, sources: list[Any], vae: torch.nn.Module, shards: list[Shard]) -> None:
    """Make DST, or take up the run that it holds.

    Args:
        dst (`Path`): See [`taken_up`].
        sources (`list[Any]`): What the weights are made of, as JSON can hold it.
        vae (`torch.nn.Module`): What is written beside the weights.
        shards (`list[Shard]`)

    Raises:
        FileExistsError: if it holds another run.
        OSError: if the disk has too little space for what is missing.
    """
    plan = {"sources": sources, "files": [[shard.name, shard.num_bytes, str(shard.dtype)] for shard in shards]}
    state = dst / STATE
    if state.exists():
        if read_json_object(state) != plan:
            raise FileExistsError(
                f"'{dst}' holds the beginning of another conversion: of other files, or with other settings. Delete it, "
                "or name another folder."
            )
        for leftover in dst.glob(f"*{UNFINISHED}"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    needed = sum(shard.num_bytes for shard in missing(dst, shards))
    needed += sum(weight.nbytes for weight in vae.parameters()) + SPARE_BYTES
    check_disk_space(dst, needed)
    dst.mkdir(parents=True, exist_ok=True)
    write_json(state, plan)


def missing(dst: Path, shards: list[Shard]) -> list[Shard]:
    return [shard for shard in shards if not (dst / shard.name).exists()]


def write_small_files(dst: Path, pipe: BagelPipeline, settings: dict[str, Any], descriptions: dict[str, Path]) -> None:
    """All but the weights of the model and the card; they come to their places when all are written.

    Args:
        dst (`Path`)
        pipe (`BagelPipeline`): Its model may be without weights.
        settings (`dict[str, Any]`): What `config.json` is to say.
        descriptions (`dict[str, Path]`): Files beside the source's weights, by name.
    """
    with tempfile.TemporaryDirectory(UNFINISHED, dir=dst) as name:
        folder = Path(name)
        pipe.vae.save_pretrained(folder / "vae")
        pipe.scheduler.save_pretrained(folder / "scheduler")
        pipe.processor.save_pretrained(folder)
        for file in ("vocab.json", "merges.txt"):
            if file in descriptions:
                # Not needed here; other readers of the repository take the tokenizer from them.
                shutil.copyfile(descriptions[file], folder / file)
        pipe.transformer.generation_config.save_pretrained(folder)
        pipe.save_config(folder)
        write_json(folder / "config.json", settings)
        write_remote_code(folder)
        for written in sorted(file for file in folder.rglob("*") if file.is_file()):
            place = dst / written.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            os.replace(written, place)


def write_card(dst: Path, repo_id: str | None, data: ModelCardData, shards: list[Shard], **facts: Any) -> None:
    """The README: what every repository has, and the facts of this one."""
    facts = {"model_place": "", "processor_place": ""} | facts
    data.library_name = "transformers"
    data.pipeline_tag = "any-to-any"
    data.tags = ["bagel", "diffusers", "text-to-image", "image-to-image", "image-text-to-text"]
    card = ModelCard.from_template(
        data,
        template_path=str(CARD),
        name=repo_id or dst.resolve().name,
        tensors=sum(len(shard.tensors) for shard in shards),
        gigabytes=sum(shard.num_bytes for shard in shards) / 1e9,
        **facts,
    )
    card.save(dst / "README.md")


def write_weights(
    dst: Path, vae: torch.nn.Module, shards: list[Shard], index: dict[str, Any] | None, verify: bool
) -> None:
    """The long part, after which DST is no unfinished run any more.

    Args:
        dst (`Path`)
        vae (`torch.nn.Module`): What `vae/` must hold.
        shards (`list[Shard]`), index (`dict`, *optional*): See [`plan_shards`].
        verify (`bool`): Whether to read again what was written.

    Raises:
        ValueError: if it was to be verified, and something that was written differs from its source.
    """
    total = sum(shard.num_bytes for shard in shards)
    todo = missing(dst, shards)
    finished = total - sum(shard.num_bytes for shard in todo)
    with tqdm(total=total, initial=finished, desc="Weights", unit="B", unit_scale=True) as progress:
        for shard in todo:
            write_shard(shard, dst, progress)
    if index is not None:
        write_json(dst / INDEX, index)
    if verify:
        verify_vae(dst / "vae", vae)
        with tqdm(total=total, desc="Verified", unit="B", unit_scale=True) as progress:
            for shard in shards:
                verify_shard(shard, dst, progress)
    (dst / STATE).unlink()
    num_tensors = sum(len(shard.tensors) for shard in shards)
    print(f"{dst}: {num_tensors} tensors, {total / 1e9:.2f} GB in {len(shards)} files.")


def verify_vae(folder: Path, vae: torch.nn.Module) -> None:
    """
    Compare the VAE that was written with its source.

    Raises:
        ValueError: naming the first tensor of the file that is not the VAE's.
    """
    written, expected = load_file(folder / "diffusion_pytorch_model.safetensors"), vae.state_dict()
    for name in sorted(written.keys() | expected.keys()):
        if name not in written or name not in expected or not torch.equal(written[name], expected[name]):
            raise ValueError(f"'{name}' in '{folder}' is not what it was made of: run the same command again.")
