# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What [`BagelPipeline`] returns."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class BagelPipelineOutput(BaseOutput):
    """
    Output of [`BagelPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images, one after the other for each prompt: `np` as `(batch, height, width, channels)`, `pt` as
            `(batch, channels, height, width)`, `latent` as `(batch, tokens, latent_dim)`; a list of such items
            without their batch dimension if the images differ in size.
        texts (`list[str]`, *optional*):
            With `think=True`, the plan that was written before each image.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | list[np.ndarray] | list[torch.Tensor]
    texts: list[str] | None = None
