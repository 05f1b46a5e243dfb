# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""From training samples to packed rows, the inputs of [`BagelForConditionalGeneration`].

Sources: published behaviour, points 22 and 31-33.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info
from transformers import BatchFeature
from transformers.utils import logging

from ..image_processing_bagel import open_image, to_rgb
from ..processing_bagel import BagelProcessor
from ..segments import Segment, sample_segments
from ..sequence import IMAGE_TOKEN, LATENT_TOKEN, TEXT_TOKEN, rope_positions
from .latents import VAE_SAMPLE_MODES, LatentEncoder
from .losses import IGNORED_LABEL


logger = logging.get_logger(__name__)

ON_ERROR = ("raise", "skip")
TIMESTEP_LAWS = ("logit_normal", "uniform")


@dataclass
class LatentBlock:
    """A block of latents of a sample.

    Attributes:
        image (`int`): Which of the sample's images it shows.
        timestep (`float`): 0 for a condition.
        noise (`torch.FloatTensor` of shape `(latent_tokens, latent_dim)`): Zero for a condition.
    """

    image: int
    timestep: torch.Tensor
    noise: torch.Tensor


@dataclass
class EncodedSample:
    """A sample as tokens, with all its random choices made; only its latents are still pixels.

    Attributes:
        input_ids, labels, token_types, position_ids (`torch.LongTensor` of shape `(tokens,)`)
        whole_length (`int`): Its tokens and those of what was dropped.
        patches (`list[torch.Tensor]`): `(patches, patch_dim)` of each image that the ViT sees.
        patch_grids (`list[tuple[int, int]]`): Rows and columns of these.
        vae_pixels (`list[torch.Tensor]`): `(3, height, width)` of each image to encode; blocks may share one.
        posterior_noise (`list[torch.Tensor | None]`): `(latent_tokens, latent_dim)` of each; `None` takes the mean.
        latent_grids (`list[tuple[int, int]]`): Rows and columns of tokens of each.
        blocks (`list[LatentBlock]`): In the order of the sequence.
    """

    input_ids: torch.Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.long))
    labels: torch.Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.long))
    token_types: torch.Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.long))
    position_ids: torch.Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.long))
    whole_length: int = 0
    patches: list[torch.Tensor] = field(default_factory=list)
    patch_grids: list[tuple[int, int]] = field(default_factory=list)
    vae_pixels: list[torch.Tensor] = field(default_factory=list)
    posterior_noise: list[torch.Tensor | None] = field(default_factory=list)
    latent_grids: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[LatentBlock] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was left out, and why."""

    name: str
    reason: str


class BagelDataCollator:
    r"""
    Turns samples into packed rows for training.

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
            Longest row. Samples are packed, in order, into as few rows as the first one with room gives. By default
            all samples of a call make one row.
        timestep_shift (`float`, *optional*, defaults to 1.0):
            Shift `s` of the noise levels towards noise: `s t / (1 + (s - 1) t)`.
        generator (`torch.Generator`, *optional*): Makes the random choices; by default torch's global one does.
        timestep_law (`str`, *optional*, defaults to `"logit_normal"`):
            Noise levels before the shift: `"logit_normal"`, the sigmoid of a normal number, or `"uniform"`.
        logit_mean (`float`, *optional*, defaults to 0.0): Mean of that normal number.
        logit_std (`float`, *optional*, defaults to 1.0): Its standard deviation.
        noised_copies (`int`, *optional*, defaults to 1):
            How often each drawn image stands in its sample, each time with noise and a level of its own. The copies
            share what they are drawn from, which is most of the work if images are small.
        cache_dir (`str` or `os.PathLike`, *optional*): See [`LatentEncoder`].
        on_error (`str`, *optional*, defaults to `"raise"`):
            Whether a sample that cannot be used stops the training (`"raise"`), or is left out with a warning and
            noted in `skipped` (`"skip"`).

    Attributes:
        skipped (`list[SkippedSample]`): What was left out.

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

    def __init__(
        self,
        processor: BagelProcessor,
        vae: Any = None,
        vae_sample_mode: str = "sample",
        text_dropout: float = 0.1,
        vit_dropout: float = 0.3,
        vae_dropout: float = 0.3,
        max_tokens: int | None = None,
        timestep_shift: float = 1.0,
        generator: torch.Generator | None = None,
        timestep_law: str = "logit_normal",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        noised_copies: int = 1,
        cache_dir: str | os.PathLike | None = None,
        on_error: str = "raise",
    ):
        self.processor = processor
        self.vae = vae
        self.vae_sample_mode = vae_sample_mode
        self.dropout = {"text": text_dropout, "vit_image": vit_dropout, "vae_image": vae_dropout}
        self.max_tokens = max_tokens
        self.timestep_shift = timestep_shift
        self.generator = generator
        self.timestep_law = timestep_law
        self.logit_mean = logit_mean
        self.logit_std = logit_std
        self.noised_copies = noised_copies
        self.on_error = on_error
        self.skipped: list[SkippedSample] = []
        self._check_settings()
        self.encode_latents = None
        if vae is not None:
            cells = processor.image_processor.vae_stride // 2 ** (len(vae.config.block_out_channels) - 1)
            self.latent_dim = cells**2 * vae.config.latent_channels
            self.encode_latents = LatentEncoder(vae, cells, cache_dir)

    def _check_settings(self) -> None:
        if not isinstance(self.processor, BagelProcessor):
            raise TypeError(f"`processor` must be a BagelProcessor, got a `{type(self.processor).__name__}`.")
        for name, rate in zip(("text_dropout", "vit_dropout", "vae_dropout"), self.dropout.values(), strict=True):
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
                raise ValueError(f"`{name}` must be a number from 0 to 1, got {rate!r}.")
        for name, value, choices in (
            ("vae_sample_mode", self.vae_sample_mode, VAE_SAMPLE_MODES),
            ("timestep_law", self.timestep_law, TIMESTEP_LAWS),
            ("on_error", self.on_error, ON_ERROR),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
        if not self.timestep_shift > 0 or not self.logit_std > 0:
            raise ValueError(
                f"`timestep_shift` and `logit_std` must be above 0, got {self.timestep_shift!r} and {self.logit_std!r}."
            )
        for name, count in (("max_tokens", self.max_tokens), ("noised_copies", self.noised_copies)):
            is_count = isinstance(count, int) and not isinstance(count, bool) and count >= 1
            if not is_count and not (name == "max_tokens" and count is None):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {count!r}.")

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> BatchFeature:
        """
        Args:
            samples (`Sequence[Mapping]`): See [`sample_segments`].

        Returns:
            [`BatchFeature`]: `input_ids`, `labels`, `mm_token_type_ids`, `position_ids` and `document_ids` (-1 at
            padding) of shape `(rows, tokens)`; with ViT images `pixel_values` and `image_grid_hw`; with latents
            `latents` and `noise` `(latent_tokens, latent_dim)`, `latent_grid_hw` `(blocks, 2)`, `timesteps`
            `(blocks,)`.

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
            if isinstance(result, SkippedSample):
                self.report(result)
            else:
                encoded.append(result)
        if not encoded:
            # The training goes on, with a batch that has nothing to learn.
            start = torch.tensor([self.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")])
            nothing = torch.full_like(start, IGNORED_LABEL)
            encoded = [EncodedSample(start, nothing, torch.full_like(start, TEXT_TOKEN), torch.zeros_like(start))]
        return self.pack(encoded)

    def encode_or_skip(self, read: Callable[[], Any], seed: int, name: str) -> EncodedSample | SkippedSample:
        """`encode` what `read` returns; an error gets the sample's name, or becomes a note, as `on_error` says."""
        try:
            sample = read()
            if isinstance(sample, Mapping) and sample.get("id") is not None:
                name = f"{name} (id {sample['id']!r})"
            encoded = self.encode(sample, seed)
            # Whole: a sample that fits only when something was dropped would always be learned without it.
            if self.max_tokens is not None and encoded.whole_length > self.max_tokens:
                raise ValueError(
                    f"It takes {encoded.whole_length} tokens, more than `max_tokens` ({self.max_tokens})."
                )
        except Exception as error:
            # Whatever a dataset raises, it is about this sample.
            if self.on_error == "skip":
                return SkippedSample(name, str(error))
            kinds = (TypeError, ValueError, OSError)
            kind = next((base for base in kinds if isinstance(error, base)), RuntimeError)
            raise kind(f"{name[0].upper()}{name[1:]}: {error}") from error
        return encoded

    def report(self, skipped: SkippedSample) -> None:
        """Note a sample that was left out, once."""
        if skipped not in self.skipped:
            logger.warning(f"Left out {skipped.name}: {skipped.reason}")
            self.skipped.append(skipped)

    def encode(self, sample: Mapping[str, Any], seed: int) -> EncodedSample:
        """
        Tokens and random choices of one sample; the same for the same seed, whatever else is in the batch.

        Args:
            sample (`Mapping`): See [`sample_segments`].
            seed (`int`): Decides what is dropped, the noise and its level.

        Raises:
            TypeError, ValueError, OSError: if the sample cannot be used.
        """
        generator = torch.Generator().manual_seed(seed)
        encoded, tokens, images = EncodedSample(), _Tokens(), _Images(self.processor)
        empty_positions = 0
        for segment in sample_segments(sample):
            token_ids = self._token_ids(segment, images)
            copies = self.noised_copies if segment.type == "vae_image" and segment.loss else 1
            encoded.whole_length += copies * len(token_ids)
            drop = torch.rand((), generator=generator) < self.dropout[segment.type]
            if segment.dropout and drop:
                # Published behaviour, point 33: a dropped image still takes its position, a dropped text does not.
                empty_positions += segment.type != "text"
                continue
            tokens.add(segment, token_ids, empty_positions)
            for _ in range(copies - 1):
                # Noised blocks do not advance the positions, so all copies stand where the image is drawn.
                tokens.add(segment, token_ids, empty_positions=0)
            empty_positions = 0
            if segment.type == "vit_image":
                encoded.patches.append(images[segment.content]["pixel_values"])
                encoded.patch_grids.append(self._grid(segment, images))
            elif segment.type == "vae_image":
                for _ in range(copies):
                    self._add_latents(encoded, segment, images, generator)
        encoded.input_ids, encoded.labels, encoded.token_types, encoded.position_ids = tokens.laid_out()
        return encoded

    def _token_ids(self, segment: Segment, images: _Images) -> torch.Tensor:
        """Ids of a segment with its two markers, `(tokens,)`."""
        processor = self.processor
        if segment.type == "text":
            text, reserved = segment.content, (processor.image_token, processor.latent_token)
            if any(token in text for token in reserved):
                raise ValueError(f"A text holds {' or '.join(reserved)}, which stand for images: {text[:100]!r}.")
            return torch.tensor(processor.tokenizer(f"<|im_start|>{text}<|im_end|>")["input_ids"])
        placeholder = processor.image_token_id if segment.type == "vit_image" else processor.latent_token_id
        markers = processor.tokenizer.convert_tokens_to_ids([processor.vision_start_token, processor.vision_end_token])
        rows, columns = self._grid(segment, images)
        return torch.tensor([markers[0], *[placeholder] * (rows * columns), markers[1]])

    def _grid(self, segment: Segment, images: _Images) -> tuple[int, int]:
        """Rows and columns of the tokens of an image block."""
        features = images[segment.content]
        if segment.type == "vit_image":
            rows, columns = features["image_grid_hw"][0].tolist()
            return rows, columns
        stride = self.processor.image_processor.vae_stride
        height, width = features["vae_pixel_values"][0].shape[1:]
        return height // stride, width // stride

    def _add_latents(
        self, encoded: EncodedSample, segment: Segment, images: _Images, generator: torch.Generator
    ) -> None:
        """Add the pixels of a block of latents to a sample, its noise and the level of it."""
        if self.encode_latents is None:
            raise ValueError("The sample draws or edits an image. Pass a `vae` to BagelDataCollator.")
        pixels, grid = images[segment.content]["vae_pixel_values"][0], self._grid(segment, images)
        shape = (grid[0] * grid[1], self.latent_dim)
        known = [index for index, other in enumerate(encoded.vae_pixels) if other is pixels]
        if not known:
            known = [len(encoded.vae_pixels)]
            samples = VAE_SAMPLE_MODES[self.vae_sample_mode] == "sample"
            encoded.vae_pixels.append(pixels)
            encoded.posterior_noise.append(torch.randn(shape, generator=generator) if samples else None)
            encoded.latent_grids.append(grid)
        timestep = self._timestep(generator) if segment.loss else torch.zeros(())
        noise = torch.randn(shape, generator=generator) if segment.loss else torch.zeros(shape)
        encoded.blocks.append(LatentBlock(known[0], timestep, noise))

    def _timestep(self, generator: torch.Generator) -> torch.Tensor:
        """A noise level in (0, 1] (published behaviour, point 31)."""
        if self.timestep_law == "uniform":
            level = 1 - torch.rand((), generator=generator)
        else:
            level = (self.logit_mean + self.logit_std * torch.randn((), generator=generator)).sigmoid()
        # At zero, where a sigmoid may underflow to, it would be a condition.
        level = level.clamp(min=torch.finfo(level.dtype).tiny)
        return self.timestep_shift * level / (1 + (self.timestep_shift - 1) * level)

    def pack(self, samples: Sequence[EncodedSample]) -> BatchFeature:
        """Packed rows of encoded samples; their latents are computed here. See `__call__`."""
        rows = fill_rows([len(sample) for sample in samples], self.max_tokens)
        ordered = [samples[index] for row in rows for index in row]
        pad_id = self.processor.tokenizer.pad_token_id

        def laid_out(name: str, padding: int) -> torch.Tensor:
            lines = [torch.cat([getattr(samples[index], name) for index in row]) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=padding)

        lengths = [[len(samples[index]) for index in row] for row in rows]
        documents = torch.arange(len(ordered)).split([len(row) for row in rows])
        batch = BatchFeature(
            {
                "input_ids": laid_out("input_ids", pad_id),
                "labels": laid_out("labels", IGNORED_LABEL),
                "mm_token_type_ids": laid_out("token_types", TEXT_TOKEN),
                "position_ids": laid_out("position_ids", 0),
                "document_ids": torch.nn.utils.rnn.pad_sequence(
                    [
                        numbers.repeat_interleave(torch.tensor(counts))
                        for numbers, counts in zip(documents, lengths, strict=True)
                    ],
                    batch_first=True,
                    padding_value=-1,
                ),
            }
        )
        if any(sample.patches for sample in ordered):
            batch["pixel_values"] = torch.cat([patches for sample in ordered for patches in sample.patches])
            batch["image_grid_hw"] = torch.tensor([grid for sample in ordered for grid in sample.patch_grids])
        blocks = [(sample, block) for sample in ordered for block in sample.blocks]
        if blocks:
            encoded = {id(sample): self._latents(sample) for sample in ordered}
            batch["latents"] = torch.cat([encoded[id(sample)][block.image] for sample, block in blocks])
            batch["noise"] = torch.cat([block.noise for _, block in blocks])
            batch["latent_grid_hw"] = torch.tensor([sample.latent_grids[block.image] for sample, block in blocks])
            batch["timesteps"] = torch.stack([block.timestep for _, block in blocks])
        return batch

    def _latents(self, sample: EncodedSample) -> list[torch.Tensor]:
        assert self.encode_latents is not None or not sample.vae_pixels
        return [
            self.encode_latents(pixels, noise)  # type: ignore[misc]  # asserted above
            for pixels, noise in zip(sample.vae_pixels, sample.posterior_noise, strict=True)
        ]


class _Tokens:
    """The tokens of one sample, segment by segment, and where they stand."""

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        self.types: list[torch.Tensor] = []
        self.noised: list[torch.Tensor] = []
        self.skipped: list[torch.Tensor] = []

    def add(self, segment: Segment, token_ids: torch.Tensor, empty_positions: int) -> None:
        """Add a segment `(tokens,)` that leaves positions empty before it."""
        kind = {"text": TEXT_TOKEN, "vit_image": IMAGE_TOKEN, "vae_image": LATENT_TOKEN}[segment.type]
        types = torch.full_like(token_ids, TEXT_TOKEN)
        types[1:-1] = kind
        labels = torch.full_like(token_ids, IGNORED_LABEL)
        if kind == TEXT_TOKEN and segment.loss:
            labels[1:] = token_ids[1:]
        self.ids.append(token_ids)
        self.labels.append(labels)
        self.types.append(types)
        self.noised.append((types == LATENT_TOKEN) & segment.loss)
        self.skipped.append(torch.zeros_like(token_ids))
        self.skipped[-1][0] = empty_positions

    def laid_out(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, labels, types and rope positions, each `(tokens,)`."""
        types, noised, skipped = torch.cat(self.types), torch.cat(self.noised), torch.cat(self.skipped)
        position_ids = rope_positions(types[None], noised=noised[None], skipped=skipped[None])[0]
        return torch.cat(self.ids), torch.cat(self.labels), types, position_ids


class _Images:
    """The images of one sample, each preprocessed once, although it may fill several blocks."""

    def __init__(self, processor: BagelProcessor):
        self.image_processor = processor.image_processor
        self._features: list[tuple[Any, BatchFeature]] = []

    def __getitem__(self, image: Any) -> BatchFeature:
        for known, features in self._features:
            if known is image:
                return features
        source = image
        if isinstance(image, Mapping):
            # How `datasets` hands out an image that it did not decode.
            source = image.get("path") if image.get("bytes") is None else open_image(image["bytes"])
        features = self.image_processor(to_rgb(source), return_vae_pixel_values=True, return_tensors="pt")
        self._features.append((image, features))
        return features


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers; two tuples do not share one by a simple sum."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)


def fill_rows(lengths: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    """Which samples stand in which row: each in the first row with room, in order.

    Args:
        lengths (`Sequence[int]`): Tokens of each sample.
        max_tokens (`int`, *optional*): Longest row; without it there is one row.
    """
    if max_tokens is None:
        return [list(range(len(lengths)))]
    rows: list[list[int]] = []
    filled: list[int] = []
    for index, length in enumerate(lengths):
        row = next((row for row, used in enumerate(filled) if used + length <= max_tokens), None)
        if row is None:
            rows.append([])
            filled.append(0)
            row = len(rows) - 1
        rows[row].append(index)
        filled[row] += length
    return rows


__all__ = ["BagelDataCollator", "EncodedSample", "SkippedSample"]
