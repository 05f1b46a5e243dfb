# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Packed latents of training images, from the VAE or from a folder that keeps what it computed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import get_worker_info
from transformers.utils import logging

from ..image_processing_bagel import patchify
from ..latents import encode_posterior, scale_latents, upcast_vae


logger = logging.get_logger(__name__)


class WorkerDeviceError(RuntimeError):
    """The VAE is out of a worker's reach."""


class LatentEncoder:
    """
    Encodes preprocessed images one by one: padding them to a common size would change their borders (point 22).

    Args:
        vae (`AutoencoderKL`): The VAE, on the device where it is to run.
        patch_size (`int`): Latent cells per token and side.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder that keeps the posterior of every image seen, so that no image is encoded twice, in this run or in
            another with the same VAE.
    """

    def __init__(self, vae: Any, patch_size: int, cache_dir: str | os.PathLike | None = None):
        self.vae = vae
        self.patch_size = patch_size
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._fingerprints: dict[torch.dtype, str] = {}

    @torch.no_grad()
    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation, packed and not scaled. `(3, height, width)` -> `(tokens, latent_dim)` twice.

        Raises:
            ValueError: if the VAE encodes the image to NaN or infinity.
            WorkerDeviceError: in a worker of a `DataLoader`, if the VAE lies on an accelerator.
        """
        if self.cache_dir is None:
            return self._encode(pixels)
        dtype = self._dtype()
        if dtype not in self._fingerprints:
            self._fingerprints[dtype] = _fingerprint(self.vae)
        digest = hashlib.sha256(f"{self._fingerprints[dtype]} {tuple(pixels.shape)}".encode())
        digest.update(pixels.contiguous().numpy().tobytes())
        path = self.cache_dir / f"{digest.hexdigest()}.safetensors"
        if path.exists():
            try:
                stored = load_file(path)
                if not (stored["mean"].isfinite().all() and stored["std"].isfinite().all()):
                    raise ValueError("they are not finite")
                return stored["mean"], stored["std"]
            except (SafetensorError, KeyError, ValueError) as error:
                logger.warning(f"The cached latents '{path}' are broken ({error}): encoding the image again.")
        mean, std = self._encode(pixels)
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        # Another process may write the same image, and this one may be killed.
        unfinished = path.with_suffix(f".{uuid4().hex}")
        save_file({"mean": mean.contiguous(), "std": std.contiguous()}, unfinished)
        unfinished.replace(path)
        return mean, std

    def __call__(self, pixels: torch.Tensor, posterior_noise: torch.Tensor | None = None) -> torch.Tensor:
        """Packed latents of one image, float32 on the CPU.

        Args:
            pixels (`torch.Tensor` of shape `(3, height, width)`): In [-1, 1].
            posterior_noise (`torch.Tensor` of shape `(tokens, latent_dim)`, *optional*):
                What makes a sample of the posterior; without it the mean is taken.

        Returns:
            `torch.Tensor` of shape `(tokens, latent_dim)`.
        """
        mean, std = self.posterior(pixels)
        latents = mean if posterior_noise is None else mean + std * posterior_noise
        return scale_latents(latents, self.vae.config)

    def _dtype(self) -> torch.dtype:
        """The VAE's type, of its first weight: `vae.dtype` looks through all modules, and images come by the thousand."""
        weight = next(self.vae.parameters(), None) if isinstance(self.vae, nn.Module) else None
        if weight is not None and weight.dtype != torch.float16:
            return weight.dtype
        upcast_vae(self.vae)
        return self.vae.dtype

    def _encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if get_worker_info() is not None and self.vae.device.type != "cpu":
            raise WorkerDeviceError(
                f"The VAE lies on {self.vae.device}, and a worker of a DataLoader cannot use it there. Take "
                "BagelDataLoader, which encodes in the main process, or `num_workers=0`, or a VAE on the CPU."
            )
        posterior = encode_posterior(self.vae, pixels)
        mean, std = (patchify(part[0].cpu(), self.patch_size) for part in (posterior.mean, posterior.std))
        return mean, std


def _fingerprint(vae: Any) -> str:
    """What tells two VAEs, or two precisions of one, apart."""
    digest = hashlib.sha256(json.dumps(dict(vae.config), sort_keys=True, default=str).encode())
    digest.update(str(vae.dtype).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
