# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Infinite, resumable data loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import BatchFeature

from .collator import BagelDataCollator
from .samples import EncodedSample, SkippedSample, mixed_seed


class _Samples(Protocol):
    """A `datasets.Dataset`, a `torch.utils.data.Dataset` with a length, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class BagelDataLoader:
    r"""
    Endless batches for [`BagelForConditionalGeneration`], packed by a token budget or by a number of samples.

    All random choices for a sample follow from `seed`, the epoch and the sample's index. So the batches do not depend
    on the number of workers, and a loader that takes up a saved state gives what the other would have given.

    Args:
        dataset (`Sequence` or `torch.utils.data.Dataset`):
            Samples, see [`~segments.sample_segments`]; anything with a length and items.
        collator ([`BagelDataCollator`]):
            Makes the batches. If it has `max_tokens`, a batch is one sequence, filled in the dataset's order.
        batch_size (`int`, *optional*):
            Number of samples of a batch, or, with `max_tokens`, the most it may have.
        shuffle (`bool`, *optional*, defaults to `True`): Whether each epoch has an order of its own.
        seed (`int`, *optional*, defaults to 0): Decides the order and all other choices.
        rank, world_size (`int`, *optional*, defaults to 0 and 1): The share of the dataset: every `world_size`-th
            sample of an epoch's order.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that read and tokenise. The VAE stays in this one, and what they leave out is reported here.

    Raises:
        ValueError: if the dataset is empty, or if neither `max_tokens` nor `batch_size` bounds a batch.

    Example:

    ```python
    >>> loader = BagelDataLoader(samples, BagelDataCollator(processor, vae=pipe.vae, max_tokens=4096))
    >>> batches = iter(loader)
    >>> batch = next(batches)
    >>> state = loader.state_dict()  # load_state_dict(state) goes on with the second batch
    ```
    """

    def __init__(
        self,
        dataset: _Samples,
        collator: BagelDataCollator,
        batch_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ):
        if batch_size is None and collator.max_tokens is None:
            raise ValueError("Pass `batch_size`, or give the collator `max_tokens`: something must bound a batch.")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"`batch_size` must be a whole number of at least 1, got {batch_size!r}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be from 0 to {world_size - 1} (`world_size` - 1), got {rank}.")
        if len(dataset) < world_size:
            raise ValueError(f"`dataset` has {len(dataset)} samples; each of {world_size} ranks needs one at least.")
        self.dataset = dataset
        self.collator = collator
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self._place = (0, 0)

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was given out, and the samples left out so far."""
        return {
            "epoch": self._place[0],
            "offset": self._place[1],
            "skipped": [(item.name, item.reason) for item in self.collator.skipped],
            **self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved place: the next iterator starts there.

        Raises:
            ValueError: if the state is of another dataset, seed or number of ranks.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(f"`state` was saved with {name}={state[name]!r}, but this loader has {value!r}.")
        self._place = (state["epoch"], state["offset"])
        self.collator.skipped = [SkippedSample(*item) for item in state["skipped"]]

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "num_samples": len(self.dataset),
            "shuffle": self.shuffle,
            "rank": self.rank,
            "world_size": self.world_size,
            "max_tokens": self.collator.max_tokens,
            "batch_size": self.batch_size,
        }

    def __iter__(self) -> Iterator[BatchFeature]:
        batch: list[EncodedSample] = []
        useless: set[int] = set()
        within_reach = len(self.dataset)
        if not self.shuffle:
            within_reach = len(range(self.rank, len(self.dataset), self.world_size))
        for place, index, result in self._encoded():
            if isinstance(result, SkippedSample):
                self.collator.report(result)
                useless.add(index)
                if len(useless) == within_reach:
                    raise ValueError("`dataset` holds no sample that can be used; see `skipped` of the collator.")
                continue
            useless.discard(index)
            if batch and self._is_full(batch, result):
                # The sample that does not fit begins the next batch: this is where a resumed run starts.
                self._place = (place[0], place[1])
                yield self.collator.pack(batch)
                batch = []
            batch.append(result)

    def _is_full(self, batch: Sequence[EncodedSample], new: EncodedSample) -> bool:
        if self.batch_size is not None and len(batch) == self.batch_size:
            return True
        budget = self.collator.max_tokens
        return budget is not None and sum(map(len, batch)) + len(new) > budget

    def _encoded(self) -> Iterator[tuple[Sequence[int], int, EncodedSample | SkippedSample]]:
        tasks = _Tasks(self.dataset, self.collator.for_workers(), self.seed)
        places = _Places(len(self.dataset), self._place, self.shuffle, self.seed, self.rank, self.world_size)
        # A generator of its own, or its start would take a number from the global one.
        generator = torch.Generator()
        return iter(
            DataLoader(tasks, sampler=places, batch_size=None, num_workers=self.num_workers, generator=generator)
        )


class _Places(Sampler):
    """Endless `(epoch, offset, index)`: the offset-th sample of an epoch's order, from a place on."""

    def __init__(self, num_samples: int, start: tuple[int, int], shuffle: bool, seed: int, rank: int, world_size: int):
        self.num_samples = num_samples
        self.start = start
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        epoch, offset = self.start
        while True:
            order = range(self.num_samples)
            if self.shuffle:
                generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
                order = torch.randperm(self.num_samples, generator=generator).tolist()
            own = order[self.rank :: self.world_size]
            for place in range(offset, len(own)):
                yield epoch, place, own[place]
            epoch, offset = epoch + 1, 0


class _Tasks(Dataset):
    """Reads and encodes the sample of a place, in a worker."""

    def __init__(self, dataset: _Samples, collator: BagelDataCollator, seed: int):
        self.dataset = dataset
        self.collator = collator
        self.seed = seed

    def __getitem__(self, task: tuple[int, int, int]) -> tuple[tuple[int, int], int, EncodedSample | SkippedSample]:
        epoch, offset, index = task
        seed = mixed_seed(self.seed, epoch, index)
        return (
            (epoch, offset),
            index,
            self.collator.encode_or_skip(lambda: self.dataset[index], seed, f"sample {index}"),
        )


__all__ = ["BagelDataLoader"]
