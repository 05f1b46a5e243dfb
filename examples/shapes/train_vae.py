# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Stage 1: the VAE, on pictures of the world."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from parts import MIXED_PRECISION
from stages import run_stage
from world import random_scene, render


BATCH_SIZE = 8
KL_WEIGHT = 1e-3
# Of a narrow posterior: a deviation of 5e-5.
LOG_VARIANCE = -20.0


def new_vae() -> AutoencoderKL:
    """FLUX's kind of VAE, small: 8 channels at an eighth of the picture's side."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
    )


def pictures(seed: int, count: int, held_out: bool = False) -> torch.Tensor:
    """`(count, 3, 64, 64)` in [-1, 1]."""
    generator = random.Random(f"vae {seed}")
    arrays = [np.asarray(render(random_scene(generator, held_out))) for _ in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def train_vae(folder: Path, num_steps: int) -> AutoencoderKL:
    """The trained VAE, its latents shifted and scaled to mean 0 and deviation 1."""
    torch.manual_seed(0)
    vae = new_vae()

    def losses(step: int) -> dict[str, torch.Tensor]:
        pixels = pictures(step, BATCH_SIZE)
        with torch.autocast("cpu", torch.bfloat16, enabled=MIXED_PRECISION == "bf16"):
            posterior = vae.encode(pixels).latent_dist
            drawn = vae.decode(posterior.sample()).sample
        error = drawn.float() - pixels
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        absolute, squared = error.abs().mean(), error.square().mean()
        return {"loss": absolute + squared + KL_WEIGHT * kl, "mse": squared, "kl": kl}

    run_stage(folder, vae, losses, num_steps, learning_rate=2e-3)
    narrow_posterior(vae)
    set_scale(vae)
    return vae


@torch.no_grad()
def narrow_posterior(vae: AutoencoderKL) -> None:
    """Make a sample of the posterior its mean. The noise taught the decoder to forgive; the latents to be learned need
    none.
    """
    variance = slice(vae.config.latent_channels, None)
    vae.encoder.conv_out.weight[variance] = 0
    vae.encoder.conv_out.bias[variance] = LOG_VARIANCE


@torch.no_grad()
def set_scale(vae: AutoencoderKL) -> None:
    latents = torch.cat([vae.encode(pictures(-1 - batch, 64)).latent_dist.mean for batch in range(8)])
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 4), scaling_factor=round(float(1 / latents.std()), 4)
    )
