# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Turn a published BAGEL checkpoint, or a fine-tune of one, into a repository that transformers and diffusers load.

    python conversion/convert_bagel_to_hf.py ByteDance-Seed/BAGEL-7B-MoT bagel --dtype bfloat16

SRC is a folder, a Hub id, or a file of weights; a training's checkpoint, which has weights only, takes the rest from
--base. DST gets the model and the processor at its root, beside `vae/`, `scheduler/` and `model_index.json`. Weights go
from file to file a piece at a time. A killed run, started again, keeps the files that it had finished.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from cards import known_facts, public_name
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard, ModelCardData
from published_files import INDEX, VAE, PublishedFiles, find_published_files
from remote_code import write_remote_code
from safe_files import StoredTensor
from streaming import UNFINISHED, Shard, check_room, plan_shards, verify_shard, write_json, write_shard
from tqdm.auto import tqdm

from diffusers_bagel import BagelPipeline
from diffusers_bagel.published import load_published_vae
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelProcessor, BagelVisionConfig
from transformers_bagel.checkpoint_bagel import check_checkpoint_files
from transformers_bagel.published_bagel import PUBLISHED_KEYS


TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS_PATTERN = "model{suffix}.safetensors"
CARD = Path(__file__).with_name("repository_card.md")
PUBLISHER = "ByteDance-Seed/BAGEL-7B-MoT"
# What a run is about, while it is unfinished.
STATE = ".conversion.json"
# Room for the small files.
SPARE_BYTES = 2**26


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="folder, Hub id or file in the published layout")
    parser.add_argument("dst", type=Path, help="folder to write")
    parser.add_argument("--base", help="complete checkpoint, for what SRC lacks: settings, tokenizer, VAE")
    parser.add_argument("--which", choices=("ema", "model"), help="weights, if there are both; the average by default")
    parser.add_argument("--revision", help="branch, tag or commit of SRC on the Hub")
    parser.add_argument(
        "--allow-pickle",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of SRC that hold its weights and may be read although they are pickles; only tensors are unpickled",
    )
    parser.add_argument("--dtype", choices=tuple(TYPES), help="of the weights; by default as they are")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--repo-id", help="what the card calls the repository; by default the name of DST")
    parser.add_argument("--base-model", default=PUBLISHER, help="what the card says the weights come from")
    parser.add_argument("--verify", action="store_true", help="read everything again and compare")
    args = parser.parse_args(arguments)
    try:
        convert(
            args.src,
            args.dst,
            base=args.base,
            which=args.which,
            revision=args.revision,
            pickles=args.allow_pickle,
            dtype=None if args.dtype is None else TYPES[args.dtype],
            max_shard_size=args.max_shard_size,
            verify=args.verify,
            repo_id=args.repo_id,
            base_model=args.base_model,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(
    src: str,
    dst: Path,
    base: str | None = None,
    which: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    repo_id: str | None = None,
    base_model: str = PUBLISHER,
    pickles: Sequence[str] = (),
) -> None:
    """
    See the module's docstring, and `--help` for the arguments.

    Raises:
        OSError, ValueError: before anything is written, if the checkpoint is broken or incomplete, does not fit its
            own settings, or if DST is taken or the disk is full.
    """
    files = find_published_files(src, base, which, revision, pickles)
    tensors = files.tensors()
    with assembled(files, tensors) as folder:
        config = BagelConfig.from_pretrained(folder)
        with init_empty_weights():
            model = BagelForConditionalGeneration(config)
        origin = SimpleNamespace(pretrained_model_name_or_path=src, ignore_mismatched_sizes=False)
        weights = [str(file) for file in folder.glob("*.safetensors") if file.name != VAE]
        check_checkpoint_files(model, weights, origin)
        shards, index = plan_shards(tensors, dtype, max_shard_size, WEIGHTS_PATTERN)
        prepare(dst, [identity(file) for file in files.weights], files.vae.stat().st_size, shards)
        corrected = corrections(folder, config)
        for name, said, right in corrected:
            print(f"{name}: the JSON says {said}, the weights and the tokenizer {right}.")

        # Small files first: what is wrong with them shows before the long part.
        vae = load_published_vae(folder, dtype)
        pipe = BagelPipeline(
            transformer=model,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            processor=BagelProcessor.from_pretrained(folder),
        )
        settings = repository_config(folder, config, dtype or tensors[0].dtype)
        write_small_files(dst, pipe, settings, files.descriptions)
    known = known_facts(files.card)
    card = ModelCardData(base_model=base_model, **({"license": "apache-2.0"} | known.metadata))
    if known.results:
        card.model_name, card.eval_results = repo_id or dst.resolve().name, known.results
    write_card(
        dst, repo_id, card, shards, source=public_name(src), corrections=corrected, known_sections=known.sections
    )
    write_weights(dst, shards, index, verify)


def write_small_files(dst: Path, pipe: BagelPipeline, settings: dict[str, Any], descriptions: dict[str, Path]) -> None:
    """All but the weights of the model and the card.

    Args:
        dst (`Path`)
        pipe (`BagelPipeline`): Its model may be without weights.
        settings (`dict[str, Any]`): What `config.json` is to say.
        descriptions (`dict[str, Path]`): Files beside the source's weights, by name.
    """
    pipe.vae.save_pretrained(dst / "vae")
    pipe.scheduler.save_pretrained(dst / "scheduler")
    pipe.processor.save_pretrained(dst)
    for name in ("vocab.json", "merges.txt"):
        if name in descriptions:
            # Not needed here; other readers of the repository take the tokenizer from them.
            shutil.copyfile(descriptions[name], dst / name)
    pipe.transformer.generation_config.save_pretrained(dst)
    pipe.save_config(dst)
    write_json(dst / "config.json", settings)
    write_remote_code(dst)


def write_card(dst: Path, repo_id: str | None, data: ModelCardData, shards: list[Shard], **facts: Any) -> None:
    """The README: what every repository has, and the facts of this one."""
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


def write_weights(dst: Path, shards: list[Shard], index: dict[str, Any] | None, verify: bool) -> None:
    """The long part, after which DST is no unfinished run any more.

    Raises:
        ValueError: if it was to be verified, and something that was written differs from its source.
    """
    total = sum(shard.num_bytes for shard in shards)
    with tqdm(total=total, desc="Weights", unit="B", unit_scale=True) as progress:
        for shard in shards:
            write_shard(shard, dst, progress)
    if index is not None:
        write_json(dst / INDEX, index)
    if verify:
        with tqdm(total=total, desc="Verified", unit="B", unit_scale=True) as progress:
            for shard in shards:
                verify_shard(shard, dst, progress)
    (dst / STATE).unlink()
    num_tensors = sum(len(shard.tensors) for shard in shards)
    print(f"{dst}: {num_tensors} tensors, {total / 1e9:.2f} GB in {len(shards)} files.")


@contextmanager
def assembled(files: PublishedFiles, tensors: list[StoredTensor]) -> Iterator[Path]:
    """One folder of links in the published layout, whatever places its files come from. Pickles, which no other code is to
    touch, are stood for by a file of the same names and shapes, with a hole instead of data.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for description, path in files.descriptions.items():
            (folder / description).symlink_to(path.resolve())
        (folder / VAE).symlink_to(files.vae.resolve())
        if files.pickled:
            shapes = Shard("model.safetensors", tuple(tensors))
            with open(folder / shapes.name, "wb") as stream:
                stream.write(shapes.header())
                stream.truncate(stream.tell() + shapes.num_bytes)
        elif len(files.weights) == 1:
            (folder / "model.safetensors").symlink_to(files.weights[0].resolve())
        else:
            for file in files.weights:
                (folder / file.name).symlink_to(file.resolve())
            write_json(folder / INDEX, {"weight_map": {file.stem: file.name for file in files.weights}})
        yield folder


def identity(file: Path) -> list[str | int]:
    """What tells a file of weights from another, or from a later one of its name."""
    return [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]


def prepare(dst: Path, sources: list[Any], vae_bytes: int, shards: list[Shard]) -> None:
    """Make DST, or take up the run that it holds.

    Args:
        dst (`Path`)
        sources (`list[Any]`): What the weights are made of, as JSON can hold it.
        vae_bytes (`int`): Size of what is written beside the weights.
        shards (`list[Shard]`)

    Raises:
        FileExistsError: if it holds anything else.
        OSError: if the disk has too little room for what is missing.
    """
    plan = {"sources": sources, "files": [[shard.name, shard.num_bytes, str(shard.dtype)] for shard in shards]}
    state = dst / STATE
    if state.exists():
        if json.loads(state.read_text(encoding="utf-8")) != plan:
            raise FileExistsError(
                f"'{dst}' holds the beginning of another conversion: of other files, or with other settings. Delete it, "
                "or name another folder."
            )
    elif dst.exists() and any(dst.iterdir()):
        raise FileExistsError(f"'{dst}' is not empty. Name a new folder.")
    finished = {shard.name for shard in shards if (dst / shard.name).exists()}
    needed = sum(shard.num_bytes for shard in shards if shard.name not in finished)
    needed += vae_bytes + SPARE_BYTES
    check_room(dst, needed)
    dst.mkdir(parents=True, exist_ok=True)
    for leftover in dst.glob(f"*{UNFINISHED}"):
        os.remove(leftover)
    write_json(state, plan)


def corrections(folder: Path, config: BagelConfig) -> list[tuple[str, Any, Any]]:
    """What the published JSON says wrongly: the key, its value there, and the right one."""
    said = published_settings(folder)
    text, vision = config.get_text_config(), config.vision_config
    assert isinstance(vision, BagelVisionConfig)
    right = {
        "max_latent_size": config.max_latent_size,
        "vit_max_num_patch_per_side": config.vit_max_num_patch_per_side,
        "llm_config.num_hidden_layers": text.num_hidden_layers,
        "llm_config.vocab_size": text.vocab_size,
        "llm_config.bos_token_id": text.bos_token_id,
        "llm_config.eos_token_id": text.eos_token_id,
        # The published code builds one layer fewer than this number.
        "vit_config.num_hidden_layers": vision.num_hidden_layers + 1,
        "vae_config.z_channels": config.latent_channels,
    }
    found = []
    for name, value in right.items():
        *parts, key = name.split(".")
        place = said.get(parts[0]) or {} if parts else said
        if key in place and place[key] != value:
            found.append((name, place[key], value))
    return found


def published_settings(folder: Path) -> dict[str, Any]:
    """The published `config.json`, completed by the files of its parts."""
    settings: dict[str, Any] = {}
    if (folder / "config.json").exists():
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("llm_config", "vit_config"):
        if settings.get(key) is None and (folder / f"{key}.json").exists():
            settings[key] = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
    return settings


def repository_config(folder: Path, config: BagelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """This package's configuration, with the published keys beside it, corrected, for engines that know BAGEL by them."""
    settings = published_settings(folder)
    kept = {key: dict(settings[key]) for key in PUBLISHED_KEYS if settings.get(key) is not None}
    for name, _, value in corrections(folder, config):
        part, _, key = name.partition(".")
        if key:
            kept[part][key] = value
    return own_config(config, dtype) | kept


def own_config(config: BagelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """This package's configuration in full, for a `config.json`."""
    config.architectures = ["BagelForConditionalGeneration"]
    config.dtype = dtype
    written = json.loads(config.to_json_string(use_diff=False))
    # Where the weights of the source were is nothing about those of the repository.
    written.pop("transformers_weights", None)
    return written


if __name__ == "__main__":
    sys.exit(main())
