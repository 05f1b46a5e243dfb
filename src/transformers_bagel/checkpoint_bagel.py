# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Names of the weights: files keep the published ones, modules have the library's; a checkpoint must fit exactly."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .safetensors_bagel import read_shapes


# Published name -> module name. The inverse is applied on saving, so that one file serves every reader.
WEIGHT_RENAMINGS = [
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vit_model\.vision_model\.", "model.vision_tower."),
    (r"^time_embedder\.mlp\.0\.", "model.time_embedder.linear_1."),
    (r"^time_embedder\.mlp\.2\.", "model.time_embedder.linear_2."),
    (r"^(connector|vae2llm|llm2vae|latent_pos_embed|vit_pos_embed)\.", r"model.\1."),
]

# Weights of the half that draws, and of the half that sees: ignored when the model is loaded without it.
GENERATION_WEIGHTS = r"_moe_gen\.|vae2llm\.|llm2vae\.|time_embedder\.|latent_pos_embed\."
UNDERSTANDING_WEIGHTS = r"vit_model\.|vision_tower\.|connector\.|vit_pos_embed\."


def ignored_weights(visual_gen: bool, visual_und: bool) -> list[str]:
    """Patterns of the weights that a model without one of its halves leaves in the files."""
    patterns = [] if visual_gen else [GENERATION_WEIGHTS]
    return patterns if visual_und else [*patterns, UNDERSTANDING_WEIGHTS]


def check_checkpoint_files(model: nn.Module, files: list[str], load_config: Any) -> None:
    """[`check_checkpoint_shapes`] of safetensors files, of which only the headers are read.

    Args:
        model (`BagelPreTrainedModel`): The model, on any device.
        files (`list[str]`): All files of the checkpoint; others than safetensors are not looked into.
        load_config (`LoadStateDictConfig`): What `from_pretrained` was asked for.

    Raises:
        OSError: if a file is truncated.
        ValueError: if a tensor is missing, unexpected or misshapen.
    """
    if not files or not all(file.endswith(".safetensors") for file in files):
        return
    shapes = {name: shape for file in files for name, shape in read_shapes(file).items()}
    check_checkpoint_shapes(
        model, shapes, load_config.pretrained_model_name_or_path, load_config.ignore_mismatched_sizes
    )


def check_checkpoint_shapes(
    model: nn.Module, shapes: dict[str, tuple[int, ...]], name: Any, ignore_mismatched_sizes: bool = False
) -> None:
    """Compare names and shapes of a whole checkpoint with a model.

    Args:
        model (`BagelPreTrainedModel`): The model, on any device.
        shapes (`dict[str, tuple[int, ...]]`): Of the checkpoint's tensors, by name.
        name (`str`): Of the checkpoint, for the error.
        ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`): Whether other shapes are accepted.

    Raises:
        ValueError: if a tensor is missing, unexpected or misshapen.
    """
    expected = {key.removeprefix("model."): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    ignored = "|".join(model._keys_to_ignore_on_load_unexpected or []) or r"(?!)"
    found: dict[str, tuple[int, ...]] = {}
    published: dict[str, str] = {}
    for key, shape in shapes.items():
        own_name = module_name(key).removeprefix("model.")
        published[own_name] = key
        if own_name in expected or not re.search(ignored, key):
            found[own_name] = shape
    if getattr(model.config, "tie_word_embeddings", False):
        found.setdefault("lm_head.weight", expected.get("lm_head.weight", ()))

    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"lacks {_some(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"has the unknown {_some([published[key] for key in unexpected])}")
    misshapen = [
        f"{published[key]} {shape} instead of {expected[key]}"
        for key, shape in found.items()
        if key in expected and shape != expected[key]
    ]
    if misshapen and not ignore_mismatched_sizes:
        problems.append(f"has the wrong shape of {_some(misshapen)}")
    if problems:
        raise ValueError(
            f"The checkpoint '{name}' does not fit its configuration: it {'; it '.join(problems)}. Download it again, or "
            "correct `config.json`."
        )


def module_name(name: str) -> str:
    """A weight's name in the module tree, from its published one; others stay as they are."""
    for pattern, replacement in WEIGHT_RENAMINGS:
        name = re.sub(pattern, replacement, name)
    return name


def rename_published_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Hook of `load_state_dict`: give the published names in a state dict the module's own."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        own_name = prefix + module_name(name.removeprefix(prefix))
        if own_name != name:
            state_dict[own_name] = state_dict.pop(name)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}"
