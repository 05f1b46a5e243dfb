# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""From training samples to packed sequences, the inputs of [`BagelForConditionalGeneration`].

Source: original behaviour, points 22 and 31-33.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info
from transformers import BatchFeature
from transformers.utils import logging

from ..errors import plain_error, shown
from ..latents import VAE_SAMPLE_MODES
from ..processing_bagel import BagelProcessor
from ..scalars import plain_numbers
from ..segments import (
    END_OF_TEXT,
    IGNORED_LABEL,
    NEXT_ACTIONS,
    TEXT_TOKEN,
    EncodedSegment,
    Segment,
    sample_segments,
)
from ..sequence import SequenceLayout, lay_out
from .latents import LatentEncoder, WorkerDeviceError
from .samples import (
    EncodedSample,
    LatentBlock,
    LatentImage,
    SkippedSample,
    fill_rows,
    mixed_seed,
    with_next_actions,
    without_next_action,
)


logger = logging.get_logger(__name__)

CHOICES = {
    "vae_sample_mode": tuple(VAE_SAMPLE_MODES),
    "timestep_law": ("logit_normal", "uniform"),
    "on_error": ("raise", "skip"),
    "next_action": NEXT_ACTIONS,
}


@dataclass(eq=False, repr=False)
class BagelDataCollator:
    r"""
    Turns samples into packed sequences for training.

    Args:
        processor ([`BagelProcessor`]): Reads texts and images.
        vae (`AutoencoderKL`, *optional*):
            Encodes the images that are drawn or edited, one by one, on its own device. Not needed for understanding.
        vae_sample_mode (`str`, *optional*, defaults to `"sample"`):
            Latents are a `"sample"` of the VAE's posterior, or its mean (`"argmax"`).
        text_dropout (`float`, *optional*, defaults to 0.1):
            How often each text that conditions a drawing is dropped. It leaves no gap in the positions.
        vit_dropout (`float`, *optional*, defaults to 0.3):
            How often the ViT tokens of an image that conditions a drawing are dropped. Their position stays empty.
        vae_dropout (`float`, *optional*, defaults to 0.3):
            The same for the clean latents.
        max_tokens (`int`, *optional*):
            Longest sequence. Samples are packed, in order, each into the first sequence with space for it. By default
            all samples of a call make one sequence.
        timestep_shift (`float`, *optional*, defaults to 1.0):
            Shift `s` of the sigmas towards noise: `s t / (1 + (s - 1) t)`.
        generator (`torch.Generator`, *optional*): Makes the random choices; by default torch's global one does.
        timestep_law (`str`, *optional*, defaults to `"logit_normal"`):
            Sigmas before the shift: `"logit_normal"`, the sigmoid of a normal number, or `"uniform"`.
        logit_mean (`float`, *optional*, defaults to 0.0): Mean of that normal number.
        logit_std (`float`, *optional*, defaults to 1.0): Its standard deviation.
        noised_copies (`int`, *optional*, defaults to 1):
            Number of independently noised copies of each target image. They share what they are drawn from, which is
            most of the work if images are small.
        cache_dir (`str` or `os.PathLike`, *optional*): See [`LatentEncoder`].
        on_error (`str`, *optional*, defaults to `"raise"`):
            Whether a sample that cannot be used stops the training (`"raise"`), or is left out with a warning and
            noted in `skipped` (`"skip"`).
        max_positions (`int`, *optional*):
            Rope positions that the model knows (`max_position_embeddings`): a sample that takes more cannot be used.
        return_layout (`bool`, *optional*, defaults to `False`):
            Whether batches have a `layout`, with which a training step reads nothing back from the device.
        next_action (`str`, *optional*, defaults to `"text"`):
            Where it is learned what follows a part of a conversation, see [`sample_segments`].

    Attributes:
        skipped (`list[SkippedSample]`):
            What was left out in this process. Workers of a plain `DataLoader` only warn; those of [`BagelDataLoader`]
            report here.

    Raises:
        TypeError, ValueError: if an argument cannot be used.

    Example:

    ```python
    >>> collator = BagelDataCollator(processor, vae=pipe.vae)
    >>> sample = {"messages": [{"role": "user", "content": "a red circle"},
    ...                        {"role": "assistant", "content": [{"type": "image", "image": "circle.png"}]}]}
    >>> loss = model(**collator([sample])).loss
    ```
    """

    processor: BagelProcessor
    vae: Any = None
    vae_sample_mode: str = "sample"
    text_dropout: float = 0.1
    vit_dropout: float = 0.3
    vae_dropout: float = 0.3
    max_tokens: int | None = None
    timestep_shift: float = 1.0
    generator: torch.Generator | None = None
    timestep_law: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    noised_copies: int = 1
    cache_dir: str | os.PathLike | None = None
    on_error: str = "raise"
    return_layout: bool = False
    max_positions: int | None = None
    next_action: str = "text"

    def __post_init__(self) -> None:
        vars(self).update(plain_numbers(vars(self)))
        if not isinstance(self.processor, BagelProcessor):
            raise TypeError(f"`processor` must be a BagelProcessor, got a `{type(self.processor).__name__}`.")
        for name in ("text_dropout", "vit_dropout", "vae_dropout"):
            rate = getattr(self, name)
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
                raise ValueError(f"`{name}` must be a number from 0 to 1, got {shown(rate)}.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {shown(getattr(self, name))}.")
        for name in ("timestep_shift", "logit_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {shown(getattr(self, name))}.")
        for name in ("max_tokens", "max_positions", "noised_copies"):
            count = getattr(self, name)
            is_count = isinstance(count, int) and not isinstance(count, bool) and count >= 1
            if not is_count and not (name != "noised_copies" and count is None):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {shown(count)}.")
        self.skipped: list[SkippedSample] = []
        self.encode_latents: LatentEncoder | None = None
        self.latent_dim: int | None = None
        if self.vae is not None:
            config = self.vae.config
            cells = self.processor.image_processor.vae_stride // 2 ** (len(config.block_out_channels) - 1)
            self.latent_dim = cells**2 * config.latent_channels
            self.encode_latents = LatentEncoder(self.vae, cells, self.cache_dir)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> BatchFeature:
        """
        Encode samples and pack them into a batch.

        Args:
            samples (`Sequence[Mapping]`): See [`sample_segments`].

        Returns:
            [`BatchFeature`]: `input_ids`, `labels`, `mm_token_type_ids`, `position_ids` and `document_ids` (-1 at
            padding) of shape `(sequences, tokens)`; with ViT images `pixel_values` and `image_grid_hw`; with latents
            `latents` and `noise` `(latent_tokens, latent_dim)`, `latent_grid_hw` `(blocks, 2)`, `timesteps`
            `(blocks,)`; with `return_layout` a [`SequenceLayout`], `layout`.

        Raises:
            TypeError, ValueError, OSError, RuntimeError: if a sample cannot be used and `on_error="raise"`, with its
                name.
        """
        encoded = []
        worker = get_worker_info()
        for index in range(len(samples)):
            device = "cpu" if self.generator is None else self.generator.device
            seed = int(torch.randint(2**62, (), generator=self.generator, device=device))
            if worker is not None:
                # Every worker has a copy of the generator, but a seed of its own in each epoch.
                seed = mixed_seed(seed, worker.seed)
            result = self.encode_or_skip(partial(samples.__getitem__, index), seed, f"sample {index}")
            if isinstance(result, EncodedSample):
                result = self.with_latents(result)
            if isinstance(result, SkippedSample):
                self.report(result)
            else:
                encoded.append(result)
        if not encoded:
            # The training goes on, with a batch that has nothing to learn: a single token.
            (text,) = self.processor.encode_segments([Segment("text", "")])
            encoded = [EncodedSample(**vars(lay_out([replace(text, token_ids=text.token_ids[:1])])))]
        return self.pack(encoded)

    def encode_or_skip(self, read: Callable[[], Any], seed: int, name: str) -> EncodedSample | SkippedSample:
        """`encode` what `read` returns; an error gets the sample's name, or becomes a note, as `on_error` says."""
        try:
            sample = read()
            if isinstance(sample, Mapping) and sample.get("id") is not None:
                name = f"{name} (id {shown(sample['id'])})"
            encoded = self.encode(sample, seed)
            # Whole: a sample that fits only when something was dropped would always be learned without it.
            for kind, count, bound in (
                ("tokens", encoded.whole_length, "max_tokens"),
                ("rope positions", encoded.whole_positions, "max_positions"),
            ):
                limit = getattr(self, bound)
                if limit is not None and count > limit:
                    raise ValueError(f"It takes {count} {kind}, more than `{bound}` ({limit}).")
        except Exception as error:
            # Whatever a dataset raises, it is about this sample.
            return self._failed(name, error)
        return replace(encoded, name=name)

    def with_latents(self, sample: EncodedSample) -> EncodedSample | SkippedSample:
        """A sample whose images the VAE has encoded; an error is treated as in `encode_or_skip`."""
        try:
            return replace(sample, latents=self._latents(sample), latent_images=[])
        except WorkerDeviceError:
            # That is about all samples.
            raise
        except Exception as error:
            return self._failed(sample.name, error)

    def _latents(self, sample: EncodedSample) -> list[torch.Tensor]:
        """Latents of each image of a sample, `(latent_tokens, latent_dim)`."""
        if sample.latents is not None or not sample.latent_images:
            return sample.latents or []
        assert self.encode_latents is not None
        return [self.encode_latents(image.pixels, image.posterior_noise) for image in sample.latent_images]

    def _failed(self, name: str, error: Exception) -> SkippedSample:
        """The note about a sample that cannot be used, or its error with the sample's name."""
        if self.on_error == "skip":
            return SkippedSample(name, str(error))
        raise plain_error(error, f"{name[0].upper()}{name[1:]}: {error}") from error

    def report(self, skipped: SkippedSample) -> None:
        """Note a sample that was left out, once."""
        if skipped not in self.skipped:
            logger.warning(f"Left out {skipped.name}: {skipped.reason}")
            self.skipped.append(skipped)

    def for_workers(self) -> BagelDataCollator:
        """A copy that encodes samples and cannot `pack` latents: it takes no VAE into other processes."""
        other = copy.copy(self)
        other.vae = other.encode_latents = other.generator = None
        return other

    def encode(self, sample: Mapping[str, Any], seed: int) -> EncodedSample:
        """
        Tokens and random choices of one sample; the same for the same seed, whatever else is in the batch.

        Args:
            sample (`Mapping`): See [`sample_segments`].
            seed (`int`): Decides what is dropped, the noise and its sigma.

        Raises:
            TypeError, ValueError, OSError: if the sample cannot be used.
        """
        generator = torch.Generator().manual_seed(seed)
        segments: list[EncodedSegment] = []
        skipped: list[int] = []
        images: list[LatentImage] = []
        blocks: list[LatentBlock] = []
        whole_length = empty_positions = dropped_positions = 0
        rates = {"text": self.text_dropout, "vit_image": self.vit_dropout, "vae_image": self.vae_dropout}
        is_asked, ends = True, False
        for encoded in self.processor.encode_segments(sample_segments(sample, self.next_action)):
            segment = encoded.segment
            copies = self.noised_copies if segment.type == "vae_image" and segment.loss else 1
            whole_length += copies * len(encoded)
            ends = segment.then is not None
            is_dropped = torch.rand((), generator=generator) < rates[segment.type]
            if segment.dropout and is_dropped:
                # A dropped image still takes its position, a dropped text does not (original behaviour, point 33).
                empty_positions += segment.type != "text"
                dropped_positions += len(encoded) if segment.type == "text" else 0
                # What follows cannot be told from what is missing: the text that asked for it, or what stands before it.
                is_asked &= segment.type != "text"
                segments[-1:] = map(without_next_action, segments[-1:])
                continue
            if not is_asked:
                encoded = without_next_action(encoded)
            # Noised blocks do not advance the positions, so all copies stand where the image is drawn.
            segments += [encoded] * copies
            skipped += [empty_positions, *[0] * (copies - 1)]
            empty_positions = 0
            if segment.type == "vae_image":
                blocks += [self._latent_block(encoded, images, generator) for _ in range(copies)]
        seen: list[Any] = [encoded for encoded in segments if encoded.segment.type == "vit_image"]
        end = EncodedSegment(Segment("text", END_OF_TEXT), torch.tensor([self.processor.tokenizer.pad_token_id]))
        if segments and segments[-1].segment.then:
            segments, skipped = [*segments, end], [*skipped, 0]
        sequence = with_next_actions(lay_out(segments, skipped), segments, end)
        return EncodedSample(
            **vars(sequence),
            whole_length=whole_length + ends,
            whole_positions=int(sequence.position_ids.max()) + 1 + dropped_positions,
            patches=[encoded.pixels for encoded in seen],
            patch_grids=[encoded.grid for encoded in seen],
            latent_images=images,
            blocks=blocks,
        )

    def _latent_block(
        self, encoded: EncodedSegment, images: list[LatentImage], generator: torch.Generator
    ) -> LatentBlock:
        """Noise and sigma of a block of latents; its image joins the list, if it is new."""
        if self.latent_dim is None:
            raise ValueError("The sample draws or edits an image. Pass a `vae` to BagelDataCollator.")
        assert encoded.pixels is not None and encoded.grid is not None
        shape = (len(encoded) - 2, self.latent_dim)
        index = next((i for i, image in enumerate(images) if image.pixels is encoded.pixels), len(images))
        if index == len(images):
            samples = VAE_SAMPLE_MODES[self.vae_sample_mode] == "sample"
            images.append(LatentImage(encoded.pixels, torch.randn(shape, generator=generator) if samples else None))
        if not encoded.segment.loss:
            return LatentBlock(index, encoded.grid, torch.zeros(()), torch.zeros(shape))
        timestep = self._timestep(generator)
        return LatentBlock(index, encoded.grid, timestep, torch.randn(shape, generator=generator))

    def _timestep(self, generator: torch.Generator) -> torch.Tensor:
        """A sigma in (0, 1] (original behaviour, point 31)."""
        if self.timestep_law == "uniform":
            sigma = 1 - torch.rand((), generator=generator)
        else:
            sigma = (self.logit_mean + self.logit_std * torch.randn((), generator=generator)).sigmoid()
        # At zero, where a sigmoid may underflow to, it would be a condition.
        sigma = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
        return self.timestep_shift * sigma / (1 + (self.timestep_shift - 1) * sigma)

    def pack(self, samples: Sequence[EncodedSample]) -> BatchFeature:
        """Packed sequences of encoded samples; latents that are missing are computed here. See `__call__`."""
        rows = fill_rows([len(sample) for sample in samples], self.max_tokens)
        packed = [[samples[index] for index in row] for row in rows]
        ordered = [sample for sequence in packed for sample in sequence]
        numbers = iter(range(len(ordered)))

        def padded(read: Callable[[EncodedSample], torch.Tensor], padding: int) -> torch.Tensor:
            sequences = [torch.cat([read(sample) for sample in sequence]) for sequence in packed]
            return pad_sequence(sequences, batch_first=True, padding_value=padding)

        batch = BatchFeature(
            {
                "input_ids": padded(lambda sample: sample.input_ids, self.processor.tokenizer.pad_token_id),
                "labels": padded(lambda sample: sample.labels, IGNORED_LABEL),
                "mm_token_type_ids": padded(lambda sample: sample.token_types, TEXT_TOKEN),
                "position_ids": padded(lambda sample: sample.position_ids, 0),
                "document_ids": padded(lambda sample: torch.full((len(sample),), next(numbers)), -1),
            }
        )
        if any(sample.patches for sample in ordered):
            batch["pixel_values"] = torch.cat([patches for sample in ordered for patches in sample.patches])
            batch["image_grid_hw"] = torch.tensor([grid for sample in ordered for grid in sample.patch_grids])
        blocks = [block for sample in ordered for block in sample.blocks]
        if blocks:
            latents: list[torch.Tensor] = []
            for sample in ordered:
                images = self._latents(sample)
                latents += [images[block.image] for block in sample.blocks]
            batch["latents"] = torch.cat(latents)
            batch["noise"] = torch.cat([block.noise for block in blocks])
            batch["latent_grid_hw"] = torch.tensor([block.grid for block in blocks])
            batch["timesteps"] = torch.stack([block.timestep for block in blocks])
        if self.return_layout:
            layout = SequenceLayout.from_inputs(
                batch["mm_token_type_ids"],
                batch.get("image_grid_hw"),
                batch.get("latent_grid_hw"),
                batch.get("timesteps"),
                batch["document_ids"],
            )
            batch["layout"] = replace(layout, labels=batch["labels"])
        # The longest first: of a streamed dataset `Trainer` takes as many rows of each tensor as the first has, and those of
        # packed images are more than there are sequences.
        in_order = sorted(batch, key=lambda name: len(batch[name]) if name != "layout" else 0, reverse=True)
        return BatchFeature({name: batch[name] for name in in_order})


__all__ = ["BagelDataCollator", "EncodedSample", "SkippedSample"]
