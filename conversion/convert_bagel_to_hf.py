# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Turn an original BAGEL checkpoint, or a fine-tune of one, into a repository that transformers and diffusers load.

    python conversion/convert_bagel_to_hf.py ByteDance-Seed/BAGEL-7B-MoT bagel --dtype bfloat16

SRC is a folder, a Hub id, or a file of weights; a training's checkpoint, which has weights only, takes the rest from
--base. DST gets the model and the processor at its root, beside `vae/`, `scheduler/` and `model_index.json`. Weights go
from file to file a piece at a time. A killed run, started again, keeps the files that it had finished.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from cards import known_facts, public_name
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCardData
from original_config import read_original, repository_settings
from original_files import OriginalFiles, find_original_files
from repositories import (
    WEIGHTS_PATTERN,
    add_output_arguments,
    identity,
    prepare,
    run,
    taken_up,
    write_card,
    write_small_files,
    write_weights,
)
from sources import opened
from streaming import Shard, check_finite, plan_shards
from tqdm.auto import tqdm

from diffusers_bagel import BagelPipeline
from diffusers_bagel.loading import vae_from_file
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.checkpoints import check_layers, check_tensors, check_values, open_tensors, own_names
from transformers_bagel.errors import some
from transformers_bagel.fine_tunes import fine_tune_of, image_settings
from transformers_bagel.original_config import corrections, read_original_config
from transformers_bagel.packed import scales_of
from transformers_bagel.weights import check_kind


PUBLISHER = "ByteDance-Seed/BAGEL-7B-MoT"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="folder, Hub id or file in the original layout")
    parser.add_argument("dst", type=Path, help="folder to write")
    parser.add_argument("--base", help="complete checkpoint, for what SRC lacks: settings, tokenizer, VAE")
    parser.add_argument("--which", choices=("ema", "model"), help="weights, if there are both; the average by default")
    parser.add_argument("--revision", help="branch, tag or commit of SRC on the Hub")
    parser.add_argument(
        "--ignore-unexpected-keys", action="store_true", help="leave out tensors of modules that a BAGEL has not"
    )
    parser.add_argument(
        "--allow-pickle",
        dest="pickles",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of SRC that hold its weights and may be read although they are pickles; only tensors are unpickled",
    )
    parser.add_argument("--base-model", default=PUBLISHER, help="what the card says the weights come from")
    add_output_arguments(parser, dtype="as they are")
    args = parser.parse_args(arguments)
    return run(convert, args)


def convert(
    src: str,
    dst: Path,
    base: str | None = None,
    which: str | None = None,
    revision: str | None = None,
    pickles: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    repo_id: str | None = None,
    base_model: str = PUBLISHER,
    ignore_unexpected_keys: bool = False,
) -> None:
    """
    See the module's docstring, and `--help` for the arguments.

    Raises:
        OSError, ValueError: before anything is written, if the checkpoint is broken or incomplete, does not fit its
            own settings, or if DST is taken or the disk is full.
    """
    dst = taken_up(dst)
    files = find_original_files(opened(src, revision), None if base is None else opened(base), which, pickles)
    tensors = files.tensors()
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    original = read_original(files.descriptions)
    if scales := scales_of({tensor.name: tensor for tensor in tensors}):
        raise ValueError(
            f"'{src}' holds weights in FP8 with factors ({some(scales.values())}), which are not converted. Load it with "
            "`BagelForConditionalGeneration.from_pretrained`, and `save_pretrained` it."
        )
    config, processor = described(files, original, shapes, src)
    check_kind(config, shapes, src)
    check_layers(config, shapes, src)
    with init_empty_weights():
        model = BagelForConditionalGeneration(config)
    check_tensors(model, {tensor.name: tensor for tensor in tensors}, src, False, ignore_unexpected_keys)
    kept = {*own_names(model, shapes)}
    tensors = [tensor for tensor in tensors if tensor.name in kept]
    shards, index = plan_shards(tensors, dtype, max_shard_size, WEIGHTS_PATTERN)
    if verify:
        with tqdm(
            total=sum(shard.num_bytes for shard in shards), desc="Checked", unit="B", unit_scale=True
        ) as progress:
            check_finite(tensors, progress)
    elif not files.pickled:
        opened_weights = open_tensors(files.weights)
        check_values({name: opened_weights[name] for name in opened_weights if name in kept}, src)
    pipe = BagelPipeline(
        transformer=model,
        vae=vae_from_file(files.vae, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        processor=processor,
    )
    known = known_facts(files.card)
    corrected = corrections(original, config)

    prepare(dst, [identity(file) for file in files.weights], pipe.vae, shards)
    for name, said, right in corrected:
        print(f"{name}: the JSON says {said}, the weights and the tokenizer {right}.")
    settings = repository_settings(original, corrected, config, most_frequent_dtype(shards))
    if fine_tune_of(src) is not None:
        settings["_name_or_path"] = public_name(src)
    write_small_files(dst, pipe, settings, files.descriptions)
    card = ModelCardData(base_model=base_model, **({"license": "apache-2.0"} | known.metadata))
    if known.results:
        card.model_name, card.eval_results = repo_id or dst.resolve().name, known.results
    write_card(
        dst, repo_id, card, shards, source=public_name(src), corrections=corrected, known_sections=known.sections
    )
    write_weights(dst, pipe.vae, shards, index, verify)


def described(
    files: OriginalFiles, original: dict, shapes: dict[str, tuple[int, ...]], src: str
) -> tuple[BagelConfig, BagelProcessor]:
    """The settings, corrected from the weights and the tokenizer, and the processor.

    Raises:
        ValueError: if they cannot be.
    """
    with assembled(files) as folder:
        try:
            config = BagelConfig.from_dict(read_original_config(original, folder, shapes))
            sizes = {} if "preprocessor_config.json" in files.descriptions else image_settings(src)
            processor = BagelProcessor.from_pretrained(folder, trust_remote_code=False, **sizes)
        except Exception as error:  # The library that reads tokenizer.json raises no other.
            sources = ", ".join(sorted({str(file.parent) for file in files.descriptions.values()}))
            raise ValueError(f"The settings or the tokenizer in '{sources}' cannot be used: {error}") from error
    return config, processor


@contextmanager
def assembled(files: OriginalFiles) -> Iterator[Path]:
    """Settings and tokenizer in one folder, whatever places they come from."""
    with tempfile.TemporaryDirectory() as name:
        for description, path in files.descriptions.items():
            shutil.copyfile(path, Path(name) / description)
        yield Path(name)


def most_frequent_dtype(shards: list[Shard]) -> torch.dtype:
    """Of the most bytes: a few tensors may be finer than the model is."""
    sizes: Counter[torch.dtype] = Counter()
    for shard in shards:
        for tensor in shard.tensors:
            sizes[shard.dtype_of(tensor)] += tensor.num_elements * shard.dtype_of(tensor).itemsize
    return sizes.most_common(1)[0][0]


if __name__ == "__main__":
    sys.exit(main())
