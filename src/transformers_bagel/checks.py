# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a forward refuses before it computes anything."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import is_torchdynamo_compiling

from .configuration_bagel import BagelConfig
from .segments import IMAGE_TOKEN, LATENT_TOKEN
from .sequence import SequenceLayout


def check_image_inputs(
    config: BagelConfig,
    pixel_values: Any,
    image_grid_hw: Any,
    latents: Any = None,
    latent_grid_hw: Any = None,
    timesteps: Any = None,
) -> None:
    """
    Refuse images that do not fit each other, or the model.

    Raises:
        ValueError: if the model lacks the part that an argument needs, or for arguments of the wrong shape.
    """
    if pixel_values is not None:
        if not config.visual_und:
            raise ValueError("`pixel_values` need a model that sees. Load it with `visual_und=True`.")
        vision_config: Any = config.vision_config
        patch_dim = vision_config.num_channels * vision_config.patch_size**2
        _check_packed("pixel_values", pixel_values, "image_grid_hw", image_grid_hw, patch_dim)
    if latents is not None:
        if not config.visual_gen:
            raise ValueError("`latents` need a model that draws. Load it with `visual_gen=True`.")
        _check_packed("latents", latents, "latent_grid_hw", latent_grid_hw, config.latent_dim)
        images = len(latent_grid_hw)
        if not isinstance(timesteps, torch.Tensor) or timesteps.shape != (images,):
            raise ValueError(f"`timesteps` must be a tensor of shape ({images},), one for each image of `latents`.")


def _check_packed(name: str, values: Any, grid_name: str, grid: Any, dim: int) -> None:
    is_grid = isinstance(grid, torch.Tensor) and grid.ndim == 2 and grid.shape[1] == 2
    sides = grid.tolist() if is_grid else []
    if not is_grid or any(side < 1 for image in sides for side in image):
        remedy = ""
        if grid is None and name == "pixel_values":
            remedy = " A trainer that does not pass it on needs a processor with `return_image_grid_thw=True`."
        raise ValueError(
            f"`{grid_name}` must be a tensor of shape (images, 2) with the rows and columns of each image of `{name}`."
            + remedy
        )
    shape = (sum(rows * columns for rows, columns in sides), dim)
    if not isinstance(values, torch.Tensor) or values.shape != shape:
        given = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"`{name}` must be a tensor of shape {shape}, as `{grid_name}` says, got {given}.")


def check_placeholders(layout: SequenceLayout, num_patches: int, num_latents: int) -> None:
    """
    Refuse a sequence with another number of placeholders than there are tokens for them.

    Raises:
        ValueError: naming the argument.
    """
    if is_torchdynamo_compiling():
        return
    for kind, argument, num_tokens in (
        (IMAGE_TOKEN, "pixel_values", num_patches),
        (LATENT_TOKEN, "latents", num_latents),
    ):
        placeholders = int((layout.token_types == kind).sum())
        if placeholders != num_tokens:
            raise ValueError(
                f"The sequence has {placeholders} placeholders for `{argument}`, but `{argument}` holds {num_tokens} "
                "tokens. Pass exactly the images that the text refers to."
            )


def check_layout(layout: SequenceLayout, tokens: Any, timesteps: Any = None, **given: Any) -> None:
    """
    Refuse a layout that describes another batch.

    Args:
        layout (`SequenceLayout`): What was passed.
        tokens (`torch.Tensor` of shape `(batch, tokens, ...)`): Ids or embeddings.
        timesteps (`torch.Tensor` of shape `(images,)`, *optional*): Of the latents.
        given (`torch.Tensor`, *optional*): Arguments of the forward that the layout holds too. Only those on the CPU are
            read.

    Raises:
        ValueError: naming the argument.
    """
    if is_torchdynamo_compiling():
        return
    shape = tuple(layout.token_types.shape)
    if tokens is None or tuple(tokens.shape[:2]) != shape:
        raise ValueError(f"`layout` is that of another batch: it describes tokens of shape {shape}.")
    own = vars(layout) | {"mm_token_type_ids": layout.token_types}
    for name, value in given.items():
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            continue
        if own[name] is None or not torch.equal(own[name], value):
            raise ValueError(f"`layout` is that of another batch: it does not describe `{name}`.")
    if isinstance(timesteps, torch.Tensor) and timesteps.device.type == "cpu":
        lengths = layout.latent_grid_hw.prod(-1)
        noised = torch.zeros_like(layout.token_types) if layout.noised is None else layout.noised
        noised = noised[layout.token_types == LATENT_TOKEN].bool()
        if len(timesteps) != len(lengths) or not torch.equal((timesteps > 0).repeat_interleave(lengths), noised):
            raise ValueError("`layout` is that of another batch: it does not describe `timesteps`.")


def check_position_range(config: BagelConfig, position_ids: torch.Tensor) -> None:
    """
    Refuse rope positions outside the range that the model knows. Positions on another device than the CPU are not read.

    Raises:
        ValueError: if one is negative, or beyond `max_position_embeddings`.
    """
    if is_torchdynamo_compiling() or position_ids.device.type != "cpu" or not position_ids.numel():
        return
    if int(position_ids.min()) < 0:
        raise ValueError(f"`position_ids` must not be negative, got {int(position_ids.min())}.")
    check_positions_end(config, int(position_ids.max()) + 1)


def check_positions_end(config: BagelConfig, end: int) -> None:
    """
    Refuse a context that needs more rope positions than the model knows.

    Raises:
        ValueError: naming both numbers.
    """
    text_config = config.get_text_config()
    # A scaled rope is there to go beyond the range.
    if is_torchdynamo_compiling() or text_config.rope_parameters["rope_type"] != "default":
        return
    if end > text_config.max_position_embeddings:
        raise ValueError(
            f"The context takes {end} rope positions, but the model knows {text_config.max_position_embeddings} "
            "(`max_position_embeddings`). Shorten the prompt."
        )
