# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Turn a LoRA from peft's format into diffusers', or the other way, with a card that shows what it does.

    python conversion/convert_lora.py coal coal-peft --to peft --sample "a star in the colour of coal" star.png

SRC is a Hub id, a folder or a file in either format. peft's is `adapter_model.safetensors` with `adapter_config.json`, for
`model.load_adapter` and `PeftModel`; diffusers' is `pytorch_lora_weights.safetensors` with the settings inside, for
`pipe.load_lora_weights`. Tensors stay as they are, except where only `.alpha` tensors tell the strength: these are
multiplied in.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub import ModelCard, ModelCardData
from repositories import run
from safe_files import check_links
from safetensors.torch import save_file
from streaming import FORMAT, free_folder, whole_folder
from torch import nn

from diffusers_bagel import BagelPipeline
from diffusers_bagel.few_steps import FewSteps
from diffusers_bagel.lora import DIFFUSERS_PREFIX, lora_config
from transformers_bagel import BagelConfig, BagelForConditionalGeneration
from transformers_bagel.adapter_checks import PEFT_PREFIX, fitting_adapter


CARD = Path(__file__).with_name("lora_card.md")
PICTURES = "pictures"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="folder, file or Hub id of a LoRA")
    parser.add_argument("dst", type=Path, help="folder to write")
    parser.add_argument("--to", choices=("peft", "diffusers"), required=True, help="format")
    parser.add_argument("--base-model", help="what the LoRA adapts; by default what its settings say")
    parser.add_argument(
        "--allow-missing-layers", action="store_true", help="whether SRC may lack layers that its settings name"
    )
    parser.add_argument("--repo-id", help="what the card calls the repository; by default the name of DST")
    parser.add_argument(
        "--sample",
        dest="samples",
        nargs=2,
        action="append",
        default=[],
        metavar=("PROMPT", "PICTURE"),
        help="for the card: a prompt, and a picture drawn from it; may be given several times",
    )
    args = parser.parse_args(arguments)
    args.samples = [(prompt, Path(picture)) for prompt, picture in args.samples]
    return run(convert_lora, args)


def convert_lora(
    src: str,
    dst: Path,
    to: str,
    base_model: str | None = None,
    repo_id: str | None = None,
    samples: Sequence[tuple[str, Path]] = (),
    allow_missing_layers: bool = False,
) -> None:
    """
    See the module's docstring.

    Raises:
        OSError, ValueError: before anything is written, if SRC is no LoRA, a picture is missing, the name of the base
            model is unknown, or DST is taken.
    """
    dst = free_folder(dst)
    for _, picture in samples:
        if not picture.is_file():
            raise FileNotFoundError(f"--sample: there is no picture '{picture}'.")
    if Path(src).is_dir():
        check_links(Path(src))
    state_dict, metadata = BagelPipeline.lora_state_dict(src, return_lora_metadata=True, use_safetensors=True)
    weights = {name.removeprefix(DIFFUSERS_PREFIX): tensor for name, tensor in state_dict.items()}
    base_model = base_model or (metadata or {}).get(f"{DIFFUSERS_PREFIX}base_model_name_or_path")
    if not base_model:
        raise ValueError(f"'{src}' does not say what it adapts. Name it with --base-model: a Hub id, or a folder.")
    few_steps = FewSteps.from_metadata(metadata, f"'{src}'")
    config = lora_config(weights, metadata, base_model, f"'{src}'")
    # For its errors alone: settings and tensors stay as they are.
    fitting_adapter(described_model(weights), config, weights, f"'{src}'", allow_missing_layers)
    with whole_folder(dst) as unfinished:
        if to == "peft":
            named = {f"{PEFT_PREFIX}{name}": tensor.contiguous() for name, tensor in weights.items()}
            # Settings that peft knows none of are in the header of the weights, under diffusers' name for it.
            own = {} if few_steps is None else {LORA_ADAPTER_METADATA_KEY: json.dumps(few_steps.metadata())}
            save_file(named, unfinished / "adapter_model.safetensors", metadata=FORMAT | own)
            config.inference_mode = True
            config.save_pretrained(str(unfinished))
        else:
            BagelPipeline.save_lora_weights(
                unfinished,
                transformer_lora_layers=weights,
                transformer_lora_adapter_metadata=config.to_dict(),
                few_steps=few_steps,
            )
        for number, (_, picture) in enumerate(samples):
            (unfinished / PICTURES).mkdir(exist_ok=True)
            shutil.copyfile(picture, unfinished / picture_name(number, picture))
        lora_card(repo_id or dst.resolve().name, to, config, samples).save(unfinished / "README.md")
    print(f"{dst}: {len(weights)} tensors, rank {config.r}, in {to}'s format.")


def described_model(weights: dict[str, torch.Tensor]) -> BagelForConditionalGeneration:
    """A model without weights that a LoRA could be of: it has the layers that the LoRA counts, with the sides of its
    matrices. The base itself may be anywhere."""
    config = BagelConfig(visual_und=any(".vision_tower." in name for name in weights))
    text: Any = config.get_text_config()
    vision: Any = config.vision_config
    text.num_hidden_layers = num_layers(weights, "language_model")
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    vision.num_hidden_layers = num_layers(weights, "vision_tower.encoder")
    with init_empty_weights():
        model = BagelForConditionalGeneration(config)
    sides: defaultdict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    for name, tensor in weights.items():
        adapted, _, part = name.rpartition(".lora_")
        if part in ("A.weight", "B.weight") and tensor.ndim == 2:
            sides[without_index(adapted), part][tensor.shape[1 if part == "A.weight" else 0]] += 1
    for name, module in model.named_modules():
        for part, side in (("A.weight", "in_features"), ("B.weight", "out_features")):
            if isinstance(module, nn.Linear) and (found := sides.get((without_index(name), part))):
                # The same in all layers, or one of them is wrong.
                setattr(module, side, found.most_common(1)[0][0])
    return model


def without_index(name: str) -> str:
    return re.sub(r"\d+", "", name)


def num_layers(names: Iterable[str], part: str) -> int:
    """One more than the highest index, at least one; a number beyond those of any model is no index."""
    found = (re.search(rf"{part}\.layers\.(\d{{1,3}})\.", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=0)


def picture_name(number: int, picture: Path) -> str:
    return f"{PICTURES}/{number}{picture.suffix}"


def lora_card(name: str, to: str, config: Any, samples: Sequence[tuple[str, Path]]) -> ModelCard:
    """A card with a gallery of prompts and pictures."""
    data = ModelCardData(
        base_model=config.base_model_name_or_path,
        library_name=to,
        license="apache-2.0",
        pipeline_tag="any-to-any",
        tags=["lora", "bagel", "peft", "diffusers", "text-to-image"],
        widget=[
            {"text": prompt, "output": {"url": picture_name(number, picture)}}
            for number, (prompt, picture) in enumerate(samples)
        ],
    )
    return ModelCard.from_template(
        data,
        template_path=str(CARD),
        name=name,
        base_model=config.base_model_name_or_path,
        format=to,
        rank=config.r,
        alpha=config.lora_alpha,
        prompt=repr(samples[0][0] if samples else "a red circle"),
        gallery=[
            (table_cell(prompt), picture_name(number, picture)) for number, (prompt, picture) in enumerate(samples)
        ],
    )


def table_cell(text: str) -> str:
    """Text as Markdown shows it in a table."""
    return " ".join(text.split()).replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main())
