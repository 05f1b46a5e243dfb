# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Build a new BAGEL from parts: a language model of Qwen2's family, a SigLIP tower, and a VAE like FLUX's.

    python conversion/build_bagel.py new --language-model Qwen/Qwen2.5-1.5B-Instruct \\
        --vision-model google/siglip-so400m-patch14-384 --vae black-forest-labs/FLUX.1-schnell

A part is a folder or a Hub id. DST gets the layout that convert_bagel_to_hf.py writes. What is built talks as its language
model does. The generation expert starts as a copy of the understanding one, the velocity at zero, and what joins the parts
at random: it has to be trained before it sees or draws.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from cards import public_name
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCardData
from huggingface_hub.errors import StrictDataclassError
from original_config import repository_settings
from original_files import SETTINGS, TOKENIZER, weight_files
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
from safe_files import read_json_object, safetensors_of
from sources import Source, opened, tensors_of
from streaming import PIECE, ContinuedTensor, plan_shards, read_tensor
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from diffusers_bagel import BagelPipeline
from diffusers_bagel.loading import VAE_FILE, check_saved_vae, vae_from_file
from transformers_bagel import (
    BagelConfig,
    BagelForConditionalGeneration,
    BagelImageProcessor,
    BagelProcessor,
    BagelTextConfig,
    BagelVisionConfig,
)
from transformers_bagel.segments import SPECIAL_TOKENS
from transformers_bagel.stored_tensors import StoredTensor


# Tensors that the parts may have and BAGEL has not: buffers of old files, SigLIP's pooling head, and its text model.
LANGUAGE_LEFT_OUT = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$"
VISION_LEFT_OUT = r"embeddings\.position_ids$|head\.|text_model\.|logit_scale$|logit_bias$"
# The original names of the parts' tensors begin with these.
LANGUAGE = "language_model."
VISION = "vit_model.vision_model."
PATCHES, POSITIONS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
TABLE, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# What the libraries raise at settings that cannot be.
BROKEN = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)
# Original bounds of images in pixels: shortest and longest side for the tower, and for the VAE.
SHORTEST_SEEN = 224
SHORTEST_DRAWN, LONGEST_DRAWN = 512, 1024


@dataclass(frozen=True)
class Part:
    """A language model or a tower.

    Attributes:
        folder (`Path`)
        descriptions (`dict[str, Path]`): Its settings, and its tokenizer if it has one, by name.
        weights (`tuple[Path, ...]`)
        config (`Any`): `Qwen2Config` or `SiglipVisionConfig`, of what is used.
        tensors (`dict[str, StoredTensor]`): What is used, by the name that the model's class gives it.
        left_out (`tuple[str, ...]`): Names of the others.
    """

    folder: Path
    descriptions: dict[str, Path]
    weights: tuple[Path, ...]
    config: Any
    tensors: dict[str, StoredTensor]
    left_out: tuple[str, ...]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dst", type=Path, help="folder to write")
    parser.add_argument(
        "--language-model", required=True, help="Qwen2 or Qwen2.5 with its tokenizer: folder or Hub id"
    )
    parser.add_argument(
        "--vision-model", required=True, help="SigLIP, with or without its text model: folder or Hub id"
    )
    parser.add_argument("--vae", required=True, help=f"folder, Hub id (also one with vae/), or a file like {VAE_FILE}")
    parser.add_argument("--max-latent-size", type=int, default=64, help="latent tokens a side of the largest drawing")
    parser.add_argument(
        "--vit-max-num-patch-per-side",
        type=int,
        help="patches a side of the largest image seen (original: 70); by default what the tower's table of positions "
        "has. Another number resizes the table",
    )
    parser.add_argument("--num-vision-layers", type=int, help="by default all but the last, as in the original")
    parser.add_argument(
        "--qk-norm",
        action="store_true",
        help="normalise queries and keys, as in the original; without it the text is the language model's",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what starts at random")
    add_output_arguments(parser, dtype="the language model's")
    args = parser.parse_args(arguments)
    return run(build, args)


def build(
    dst: Path,
    language_model: str,
    vision_model: str,
    vae: str,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    max_latent_size: int = 64,
    vit_max_num_patch_per_side: int | None = None,
    num_vision_layers: int | None = None,
    qk_norm: bool = False,
    seed: int = 0,
    repo_id: str | None = None,
    verify: bool = False,
) -> None:
    """
    See the module's docstring, and `--help` for the arguments.

    Raises:
        OSError, ValueError: before anything is written, if a part is broken, incomplete or of another kind, if an
            argument does not fit it, or if DST is taken or the disk is full.
    """
    dst = taken_up(dst)
    check_at_least_one("max-latent-size", max_latent_size)
    check_at_least_one("vit-max-num-patch-per-side", vit_max_num_patch_per_side)
    check_at_least_one("num-vision-layers", num_vision_layers)
    with naming("language-model", language_model):
        language = read_language_model(language_model)
        tokenizer = read_tokenizer(language)
    with naming("vision-model", vision_model):
        tower = read_vision_model(vision_model, num_vision_layers)
    with naming("vae", vae):
        autoencoder = read_vae(vae, dtype)
    added = add_special_tokens(tokenizer)
    side = vit_max_num_patch_per_side or tower.config.image_size // tower.config.patch_size
    config = bagel_config(language.config, tower.config, autoencoder, tokenizer, max_latent_size, side, qk_norm)
    dtype = dtype or language.tensors[TABLE].dtype
    with init_empty_weights():
        model = BagelForConditionalGeneration(config)
    with tempfile.TemporaryDirectory() as name:
        new = make_new(Path(name), config, language, tower, seed, dtype)
        tensors = planned(model, language, tower, tensors_of((new,)))
        shards, index = plan_shards(tensors, dtype, max_shard_size, WEIGHTS_PATTERN)
        sources: list[Any] = [identity(file) for file in (*language.weights, *tower.weights)]
        # Made again in every run, and the same again from the same seed.
        sources.append(hashlib.sha256(new.read_bytes()).hexdigest())
        prepare(dst, sources, autoencoder, shards)
        report(language, tower, config, added)
        pipe = BagelPipeline(
            transformer=model,
            vae=autoencoder,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            processor=BagelProcessor(image_processor(config), tokenizer),
        )
        write_small_files(dst, pipe, repository_settings({}, [], config, dtype), language.descriptions)
        parts = [public_name(source) for source in (language_model, vision_model, vae)]
        write_card(
            dst, repo_id, ModelCardData(base_model=parts), shards, parts=", ".join(f"`{part}`" for part in parts)
        )
        write_weights(dst, pipe.vae, shards, index, verify)


@contextmanager
def naming(argument: str, source: str) -> Iterator[None]:
    """Let an error say which argument it is about."""
    try:
        yield
    except BROKEN as error:
        raise ValueError(f"--{argument} '{source}': {error}") from error


def check_at_least_one(argument: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"--{argument} must be at least 1, got {value}.")


def read_language_model(source: str) -> Part:
    """
    Read a language model and its tokenizer.

    Raises:
        OSError, ValueError: if it is none that BAGEL's understanding expert can be, or not whole.
    """
    place = opened(source)
    settings = read_json_object(place.present("config.json"))
    if settings.get("model_type") != "qwen2":
        raise ValueError(
            f"it is of the type {settings.get('model_type')!r}, and 'qwen2' is wanted: Qwen2 or Qwen2.5. Other models, "
            "Qwen3 too, have other layers than BAGEL."
        )
    config = Qwen2Config.from_dict(settings)
    if config.use_sliding_window:
        raise ValueError("it has `use_sliding_window`, and BAGEL's layers attend to everything before.")
    if config.hidden_size % 4:
        raise ValueError(f"its `hidden_size` is {config.hidden_size}, and position tables need a multiple of 4.")
    # For its checks.
    BagelTextConfig(**part_settings(config))
    with init_empty_weights():
        expected = Qwen2ForCausalLM(config).state_dict()
    weights = weight_files(place, None if place.file else "model")
    found = tensors_of(weights)
    if config.tie_word_embeddings:
        # Read as the library reads it, whatever the file holds.
        del expected[HEAD]
        found.pop(HEAD, None)
    tensors, left_out = fitting(found, expected, LANGUAGE_LEFT_OUT)
    if config.tie_word_embeddings:
        # BAGEL's head is a table of its own, which may part from the other in training.
        tensors[HEAD] = tensors[TABLE]
    return Part(place.folder, descriptions_of(place), weights, config, tensors, left_out)


def read_tokenizer(language: Part) -> PreTrainedTokenizerBase:
    if not {"tokenizer.json", "vocab.json"} & language.descriptions.keys():
        raise FileNotFoundError("it has neither tokenizer.json nor vocab.json.")
    try:
        return AutoTokenizer.from_pretrained(language.folder, trust_remote_code=False)
    except Exception as error:  # The library that reads tokenizer.json raises no other.
        raise ValueError(f"its tokenizer cannot be read ({error}).") from error


def read_vision_model(source: str, num_layers: int | None) -> Part:
    """
    Read a SigLIP tower.

    Args:
        source (`str`)
        num_layers (`int`, *optional*): By default all but the last (original behaviour, point 11).

    Raises:
        OSError, ValueError: if it is no tower that BAGEL can see with, or not whole.
    """
    place = opened(source)
    settings = read_json_object(place.present("config.json"))
    if settings.get("model_type") not in ("siglip", "siglip_vision_model"):
        raise ValueError(
            f"it is of the type {settings.get('model_type')!r}, and 'siglip' or 'siglip_vision_model' is wanted."
        )
    config = SiglipVisionConfig.from_dict(settings.get("vision_config", settings))
    image_size, patch_size = config.image_size, config.patch_size
    if not (isinstance(image_size, int) and isinstance(patch_size, int) and config.num_channels == 3):
        raise ValueError(
            f"it reads images of {config.num_channels} channels and {image_size} pixels by patches of {patch_size}, and "
            "squares of 3 channels are wanted."
        )
    available = config.num_hidden_layers
    config.num_hidden_layers = available - 1 if num_layers is None else num_layers
    if not 1 <= config.num_hidden_layers <= available:
        raise ValueError(
            f"it has {available} layers, and {config.num_hidden_layers} are asked for. Pass --num-vision-layers."
        )
    config.vision_use_head = False
    BagelVisionConfig(**part_settings(config))
    with init_empty_weights():
        expected = SiglipVisionModel(config).state_dict()
    dropped = "|".join(str(layer) for layer in range(config.num_hidden_layers, available))
    left_out = VISION_LEFT_OUT + (rf"|encoder\.layers\.({dropped})\." if dropped else "")
    weights = weight_files(place, None if place.file else "model")
    # The library writes a tower alone without the prefix that it has in older files and beside a text model.
    found = {name.removeprefix("vision_model."): tensor for name, tensor in tensors_of(weights).items()}
    return Part(place.folder, descriptions_of(place), weights, config, *fitting(found, expected, left_out))


def descriptions_of(source: Source) -> dict[str, Path]:
    return {name: file for name in (*SETTINGS, *TOKENIZER) if (file := source.find(name)) is not None}


def fitting(
    found: dict[str, StoredTensor], expected: dict[str, torch.Tensor], left_out: str
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """
    The tensors of a model, and the names of those of its files that it can do without.

    Args:
        found (`dict[str, StoredTensor]`): What its files hold.
        expected (`dict[str, torch.Tensor]`): What its class has, on any device.
        left_out (`str`): Pattern of other names that are known.

    Raises:
        ValueError: if something is missing, unknown or misshapen.
    """
    problems = [f"it lacks {some(expected.keys() - found.keys())}"] if expected.keys() - found.keys() else []
    unknown = {name for name in found.keys() - expected.keys() if not re.match(left_out, name)}
    if unknown:
        problems.append(f"it has the unknown {some(unknown)}")
    problems += [
        f"its {name} has the shape {found[name].shape} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ][:3]
    if problems:
        raise ValueError(f"its weights do not fit its config.json: {'; '.join(problems)}.")
    return {name: found[name] for name in expected}, tuple(sorted(found.keys() - expected.keys()))


def some(names: set[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def read_vae(source: str, dtype: torch.dtype | None) -> AutoencoderKL:
    """
    Read a VAE.

    Args:
        source (`str`): A folder or Hub id in diffusers' layout, or with `vae/` or `ae.safetensors` in it, or a file in
            the original layout.
        dtype (`torch.dtype`, *optional*): Of the weights; by default the file's.

    Raises:
        OSError, ValueError: if it is none that BAGEL can draw with, or not whole.
    """
    place = opened(source)
    if place.file is None and (place.folder / "vae" / "config.json").exists():
        vae = saved_vae(place, "vae/", dtype)
    elif (file := place.file or place.find(VAE_FILE)) is not None:
        vae = original_vae(file, dtype)
    else:
        vae = saved_vae(place, "", dtype)
    if vae.config.shift_factor is None or (vae.config.in_channels, vae.config.out_channels) != (3, 3):
        raise ValueError(
            f"it has a `shift_factor` of {vae.config.shift_factor} and turns {vae.config.in_channels} channels into "
            f"{vae.config.out_channels}, and FLUX's, which BAGEL draws with, has one and reads and writes 3."
        )
    return vae


def saved_vae(source: Source, folder: str, dtype: torch.dtype | None) -> AutoencoderKL:
    """In diffusers' layout, in a folder such as `"vae/"` of its source."""
    kind = read_json_object(source.present(f"{folder}config.json")).get("_class_name")
    if kind != "AutoencoderKL":
        raise ValueError(f"it is of the class {kind!r}, and 'AutoencoderKL' is wanted.")
    file = source.find(f"{folder}diffusion_pytorch_model.safetensors")
    if file is None:
        raise FileNotFoundError(
            f"'{source.folder / folder}' holds no diffusion_pytorch_model.safetensors. Only safetensors are read."
        )
    stored = safetensors_of(file)[0].dtype
    check_saved_vae(source.folder / folder)
    return AutoencoderKL.from_pretrained(
        source.folder / folder, torch_dtype=dtype or stored, use_safetensors=True, local_files_only=True
    )


def original_vae(file: Path, dtype: torch.dtype | None) -> AutoencoderKL:
    """In the original layout, whatever the file's name."""
    safetensors_of(file)
    return vae_from_file(file, dtype)


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give a tokenizer those of BAGEL's tokens that it lacks, and say which."""
    known = tokenizer.get_vocab().keys()
    absent = [token for token in SPECIAL_TOKENS.values() if token not in known]
    tokenizer.add_tokens(absent, special_tokens=True)
    return absent


def bagel_config(
    text: Qwen2Config,
    vision: SiglipVisionConfig,
    vae: AutoencoderKL,
    tokenizer: PreTrainedTokenizerBase,
    max_latent_size: int,
    vit_side: int,
    qk_norm: bool,
) -> BagelConfig:
    """The parts' settings as the original JSON spells them, which the configuration reads."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    own = {name: ids.pop(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return BagelConfig(
        llm_config=part_settings(text)
        | own
        | {
            # Many tables are longer than their tokenizer: then the new tokens have rows already.
            "vocab_size": max(text.vocab_size, 1 + max(tokenizer.get_vocab().values())),
            "tie_word_embeddings": False,
            "qk_norm": qk_norm,
        },
        vit_config=part_settings(vision)
        | {
            "image_size": vit_side * vision.patch_size,
            # The original code builds one layer fewer than this number.
            "num_hidden_layers": vision.num_hidden_layers + 1,
        },
        vae_config={
            "z_channels": vae.config.latent_channels,
            "downsample": 2 ** (len(vae.config.block_out_channels) - 1),
        },
        max_latent_size=max_latent_size,
        vit_max_num_patch_per_side=vit_side,
        **ids,
    )


def part_settings(config: Qwen2Config | SiglipVisionConfig) -> dict[str, Any]:
    """What BAGEL's configuration takes over: not the type, which is the whole model's, nor the head that it lacks."""
    return {key: value for key, value in config.to_dict().items() if key not in ("dtype", "vision_use_head")}


def image_processor(config: BagelConfig) -> BagelImageProcessor:
    """The original sizes, as far as the position tables reach."""
    vision: Any = config.vision_config
    seen = config.vit_max_num_patch_per_side * vision.patch_size
    drawn = min(LONGEST_DRAWN, config.max_latent_size * config.latent_stride)
    return BagelImageProcessor(
        size={"shortest_edge": min(SHORTEST_SEEN, seen), "longest_edge": seen},
        patch_size=vision.patch_size,
        vae_size={"shortest_edge": min(SHORTEST_DRAWN, drawn), "longest_edge": drawn},
        vae_stride=config.latent_stride,
    )


@torch.no_grad()
def make_new(folder: Path, config: BagelConfig, language: Part, tower: Part, seed: int, dtype: torch.dtype) -> Path:
    """
    The weights that no part has, under their original names, in a file of a folder.

    A model without layers, whose vocabulary is the tokens that are to be added, initialises and names them as the
    whole one would.
    """
    small = copy.deepcopy(config)
    text: Any = small.get_text_config()
    vision: Any = small.vision_config
    added = text.vocab_size - language.config.vocab_size
    # No row at all would do, and torch would warn of it.
    text.num_hidden_layers, text.layer_types, text.vocab_size = 0, [], max(added, 1)
    vision.num_hidden_layers = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BagelForConditionalGeneration(small)
    embeddings = model.model.vision_tower.embeddings
    embeddings.patch_embedding.weight.copy_(linear_patches(read_tensor(tower.tensors[PATCHES], torch.float32)))
    side = config.vit_max_num_patch_per_side
    embeddings.position_embedding.weight.copy_(
        resized_positions(read_tensor(tower.tensors[POSITIONS], torch.float32), side)
    )
    if added:
        model.get_input_embeddings().weight.copy_(mean_row(language.tensors[TABLE]))
        model.lm_head.weight.copy_(mean_row(language.tensors[HEAD]))
    model.to(dtype).save_pretrained(folder)
    return folder / "model.safetensors"


def planned(
    model: BagelForConditionalGeneration, language: Part, tower: Part, made: dict[str, StoredTensor]
) -> list[StoredTensor]:
    """
    Every tensor of the model under its original name, and where its bytes are.

    Args:
        model (`BagelForConditionalGeneration`): Without weights.
        language, tower (`Part`)
        made (`dict[str, StoredTensor]`): The new weights, see [`make_new`].
    """
    # What the parts have wins over what the small model needed to exist.
    plan = made | {VISION + name: tensor for name, tensor in tower.tensors.items()}
    plan |= {LANGUAGE + name: tensor for name, tensor in language.tensors.items()}
    plan |= {VISION + name: made[VISION + name] for name in (PATCHES, POSITIONS)}
    shape = tuple(model.get_input_embeddings().weight.shape)
    if shape != language.tensors[TABLE].shape:
        for name in (TABLE, HEAD):
            settings = vars(language.tensors[name]) | {"shape": shape}
            plan[LANGUAGE + name] = ContinuedTensor(**settings, continuation=made[LANGUAGE + name])
    ones = made[LANGUAGE + NORM]
    original = {
        name.replace("model.language_model.", LANGUAGE + "model."): weight
        for name, weight in model.state_dict().items()
        if name.startswith("model.language_model.")
    }
    for name, weight in original.items():
        twin = name.replace("_moe_gen", "")
        if twin.endswith(("q_norm.weight", "k_norm.weight")):
            # Norms start at ones, of which the small model's has enough for a head.
            plan[twin] = replace(
                ones, shape=tuple(weight.shape), end=ones.start + weight.numel() * ones.dtype.itemsize
            )
        plan[name] = plan[twin]
    # By name, so that a copy follows what it is one of, and comes out of the cache of the system.
    return [replace(plan[name], name=name) for name in sorted(plan)]


def linear_patches(kernel: torch.Tensor) -> torch.Tensor:
    """`(hidden, channels, rows, columns)` -> `(hidden, rows * columns * channels)` (original behaviour, point 9)."""
    return kernel.permute(0, 2, 3, 1).flatten(1)


def resized_positions(table: torch.Tensor, side: int) -> torch.Tensor:
    """A table of `(positions, hidden)` for a grid of another side, `(side * side, hidden)`, as SigLIP resizes its own."""
    old_side = round(table.shape[0] ** 0.5)
    if old_side == side:
        return table
    grid = table.view(1, old_side, old_side, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T


def mean_row(table: StoredTensor) -> torch.Tensor:
    """Mean of the rows, `(hidden,)`, a few read at a time. New tokens start there, as those of the library do."""
    num_rows, width = table.shape
    row_bytes = width * table.dtype.itemsize
    step = max(1, PIECE // row_bytes)
    total = torch.zeros(width, dtype=torch.float64)
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        start, end = (table.start + row * row_bytes for row in (first, last))
        rows = replace(table, shape=(last - first, width), start=start, end=end)
        total += read_tensor(rows, torch.float32).sum(0, dtype=torch.float64)
    return (total / num_rows).float()


def report(language: Part, tower: Part, config: BagelConfig, added: list[str]) -> None:
    """Say what was left out of the parts, and what was added to them."""
    for name, part in (("language model", language), ("tower", tower)):
        if part.left_out:
            groups = {re.findall(r"^(?:encoder\.layers\.\d+|[^.]+)", tensor)[0] for tensor in part.left_out}
            print(f"Left out of the {name}: {len(part.left_out)} tensors of {', '.join(sorted(groups))}.")
    if added:
        print(f"New in the vocabulary: {', '.join(added)}.")
    text: Any = config.get_text_config()
    if text.vocab_size > language.config.vocab_size:
        print(f"The tables of tokens grow from {language.config.vocab_size} rows to {text.vocab_size}.")
    old_side = tower.config.image_size // tower.config.patch_size
    if config.vit_max_num_patch_per_side != old_side:
        print(f"The tower's positions are resized from {old_side} a side to {config.vit_max_num_patch_per_side}.")


if __name__ == "__main__":
    sys.exit(main())
