# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Between pixels and the latents that the model knows, through diffusers' `AutoencoderKL` (original behaviour, point 22).

Training and drawing share these functions: what a model learned is what it later sees.
"""

from __future__ import annotations

from typing import Any

import torch


# diffusers' names for reading a posterior, and the plain words for the second one.
VAE_SAMPLE_MODES = {"sample": "sample", "argmax": "argmax", "mode": "argmax", "mean": "argmax"}


def scale_latents(latents: torch.Tensor, vae_config: Any) -> torch.Tensor:
    """Latents as the model knows them: shifted and scaled as the VAE's configuration says, in float32."""
    return (latents.float() - vae_config.shift_factor) * vae_config.scaling_factor


def encode_posterior(vae: Any, pixels: torch.Tensor, device: torch.device | None = None) -> Any:
    """
    What the VAE makes of one image, or of several of one size, not yet scaled.

    Args:
        vae (`AutoencoderKL`): The VAE; see [`upcast_vae`] for one in float16.
        pixels (`torch.Tensor` of shape `(3, height, width)` or `(batch, 3, height, width)`): In [-1, 1].
        device (`torch.device`, *optional*): Where the VAE runs, if it is offloaded; by default where it is.

    Returns:
        `DiagonalGaussianDistribution`: In float32 and of shape `(batch, channels, height, width)`, whatever the VAE's dtype.

    Raises:
        ValueError: if there is no VAE, or if a pixel, or a number of the posterior, is not finite.
    """
    if vae is None:
        raise ValueError("An image cannot be encoded without a `vae`. Load the pipeline with one.")
    if not pixels.isfinite().all():
        raise ValueError("The pixels of an image hold NaN or infinity.")
    upcast_vae(vae)
    batch = pixels if pixels.ndim == 4 else pixels.unsqueeze(0)
    posterior = vae.encode(batch.to(device or vae.device, vae.dtype)).latent_dist
    parameters = posterior.parameters.float()
    if not parameters.isfinite().all():
        raise ValueError(
            f"The VAE encoded an image to NaN or infinity in {vae.dtype}. Load it in float32 or bfloat16."
        )
    return type(posterior)(parameters)


def decode_latents(vae: Any, latents: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """
    Pixels of scaled latents.

    Args:
        vae (`AutoencoderKL`), device (`torch.device`, *optional*): See [`encode_posterior`].
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): As the model knows them.

    Returns:
        `torch.FloatTensor` of shape `(batch, 3, height, width)`: In about [-1, 1].

    Raises:
        ValueError: if a pixel is not finite.
    """
    upcast_vae(vae)
    cells = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
    pixels = vae.decode(cells.to(device or vae.device, vae.dtype), return_dict=False)[0].float()
    if not pixels.isfinite().all():
        raise ValueError(f"The VAE decoded latents to NaN or infinity in {vae.dtype}. Load it in float32 or bfloat16.")
    return pixels


def upcast_vae(vae: Any) -> None:
    """Cast a float16 VAE to float32 for good, if its configuration says `force_upcast`: float16 overflows in it."""
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        vae.to(torch.float32)
