# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Infinite, resumable data loader."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import BatchFeature

from ..errors import plain_error, shown
from ..scalars import plain_numbers
from .collator import BagelDataCollator
from .samples import EncodedSample, SkippedSample, mixed_seed


# Epoch, how far in the epoch's order, and the number of the sample that stands there.
Place = tuple[int, int, int]


@dataclass(eq=False, repr=False)
class BagelDataLoader:
    r"""
    Endless batches for [`BagelForConditionalGeneration`], packed by a token budget or by a number of samples.

    All random choices for a sample follow from `seed`, the epoch and the sample's index. So the batches do not depend
    on the number of workers, and a loader that takes up a saved state gives what the other would have given.

    Args:
        dataset (`Sequence`, `torch.utils.data.Dataset` or `Iterable`):
            Samples, see [`~segments.sample_segments`]: anything with a length and items, or a stream, which is read here,
            from its beginning in every epoch. If it has `set_epoch`, that is called before.
        collator ([`BagelDataCollator`]):
            Makes the batches. If it has `max_tokens`, a batch is one sequence, filled in the dataset's order.
        batch_size (`int`, *optional*):
            Number of samples of a batch, or, with `max_tokens`, the most it may have.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether each epoch has an order of its own. A stream keeps its order.
        seed (`int`, *optional*, defaults to 0): Decides the order and all other choices.
        rank, world_size (`int`, *optional*, defaults to 0 and 1): The share of the dataset: every `world_size`-th
            sample of an epoch's order.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that read and tokenise. The VAE stays in this one, and what they leave out is reported here.

    Attributes:
        names (`list[str]`): Of the samples in the batch that was given out last.

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

    dataset: Any
    collator: BagelDataCollator
    batch_size: int | None = None
    shuffle: bool = True
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0

    def __post_init__(self) -> None:
        vars(self).update(plain_numbers(vars(self)))
        if self.batch_size is None and self.collator.max_tokens is None:
            raise ValueError("Pass `batch_size`, or give the collator `max_tokens`: something must bound a batch.")
        if self.batch_size is not None and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise ValueError(f"`batch_size` must be a whole number of at least 1, got {shown(self.batch_size)}.")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"`rank` must be from 0 to {self.world_size - 1} (`world_size` - 1), got {self.rank}.")
        if not self._is_stream and len(self.dataset) < self.world_size:
            raise ValueError(
                f"`dataset` has {len(self.dataset)} samples; each of {self.world_size} ranks needs one at least."
            )
        self._place = (0, 0)
        self.names: list[str] = []

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
                raise ValueError(
                    f"`state` was saved with {name}={shown(state[name])}, but this loader has {shown(value)}."
                )
        self._place = (state["epoch"], state["offset"])
        self.collator.skipped = [SkippedSample(*item) for item in state["skipped"]]

    def _identity(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("seed", "shuffle", "rank", "world_size", "batch_size")}
        num_samples = None if self._is_stream else len(self.dataset)
        return {**own, "num_samples": num_samples, "max_tokens": self.collator.max_tokens}

    @property
    def _is_stream(self) -> bool:
        return isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__len__")

    def __iter__(self) -> Iterator[BatchFeature]:
        batch: list[EncodedSample] = []
        length = 0
        useless: set[int] = set()
        last_useful = self._place[0]
        is_stream = self._is_stream
        # Without shuffling a rank sees the same share of the dataset in every epoch.
        within_reach = 0 if is_stream else len(self.dataset) if self.shuffle else len(self._order(0))
        tasks = _Tasks(None if is_stream else self.dataset, self.collator.for_workers(), self.seed)
        # A generator of its own, or its start would take a number from the global one.
        generator = torch.Generator()
        for encoded in DataLoader(
            tasks,
            sampler=self._stream() if is_stream else self._places(),  # type: ignore[arg-type]  # it is iterated once
            batch_size=None,
            num_workers=self.num_workers,
            generator=generator,
        ):
            (epoch, offset, index), result = pickle.loads(encoded) if isinstance(encoded, bytes) else encoded
            if isinstance(result, EncodedSample):
                result = self.collator.with_latents(result)
            if isinstance(result, SkippedSample):
                self.collator.report(result)
                useless.add(index)
                if len(useless) == within_reach or epoch > last_useful + 1:
                    raise ValueError("`dataset` holds no sample that can be used; see `skipped` of the collator.")
                continue
            useless.discard(index)
            last_useful = epoch
            if batch and self._is_full(len(batch), length + len(result)):
                # The sample that does not fit begins the next batch: this is where a resumed run starts.
                self._place = (epoch, offset)
                self.names = [sample.name for sample in batch]
                yield self.collator.pack(batch)
                batch, length = [], 0
            batch.append(result)
            length += len(result)

    def _is_full(self, num_samples: int, new_length: int) -> bool:
        """Whether a batch of so many samples is not to grow to a length."""
        budget = self.collator.max_tokens
        return num_samples == self.batch_size or (budget is not None and new_length > budget)

    def _order(self, epoch: int) -> Sequence[int]:
        """Samples of this rank in an epoch."""
        order: Sequence[int] = range(len(self.dataset))
        if self.shuffle:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            order = torch.randperm(len(order), generator=generator).tolist()
        return order[self.rank :: self.world_size]

    def _places(self) -> Iterator[tuple[Place, None]]:
        """Every place from the saved one on, without end; its sample is read in a worker."""
        epoch, start = self._place
        while True:
            order = self._order(epoch)
            for offset in range(start, len(order)):
                yield (epoch, offset, order[offset]), None
            epoch, start = epoch + 1, 0

    def _stream(self) -> Iterator[tuple[Place, Callable[[], Any]]]:
        """Every place of a stream from the saved one on, and what gives its sample, without end."""
        epoch, start = self._place
        while True:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            offset = -1
            for offset, (index, sample) in enumerate(
                itertools.islice(enumerate(self.dataset), self.rank, None, self.world_size)
            ):
                if offset >= start:
                    yield (epoch, offset, index), partial(_same, sample) if self.num_workers == 0 else _Packed(sample)
            if offset < 0:
                raise ValueError(
                    f"`dataset` gave rank {self.rank} of {self.world_size} no sample in epoch {epoch}. Pass a stream with "
                    "enough of them, which can be read more than once."
                )
            epoch, start = epoch + 1, 0


@dataclass
class _Tasks(Dataset):
    """Reads and encodes the sample of a place, in a worker; that of a stream is handed over."""

    dataset: Any
    collator: BagelDataCollator
    seed: int

    def __getitem__(
        self, task: tuple[Place, Callable[[], Any] | None]
    ) -> tuple[Place, EncodedSample | SkippedSample] | bytes:
        place, read = task
        epoch, _, index = place
        seed = mixed_seed(self.seed, epoch, index)
        result = place, self.collator.encode_or_skip(read or (lambda: self.dataset[index]), seed, f"sample {index}")
        return result if get_worker_info() is None else _as_bytes(result)


def _same(sample: Any) -> Any:
    return sample


class _Packed:
    """A sample on its way to a worker, which unpacks it by a call.

    The queue of a worker would pack it in a thread: beside that of another worker, and images load in one thread at a time. What
    cannot be packed it drops, and the batch would be waited for without end. Here it is an error of its sample.
    """

    def __init__(self, sample: Any):
        self.content: bytes | Exception
        try:
            self.content = pickle.dumps(sample, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            self.content = plain_error(error, f"It cannot be handed to a worker: {error}")

    def __call__(self) -> Any:
        if isinstance(self.content, Exception):
            raise self.content
        return pickle.loads(self.content)


class _Pickler(pickle.Pickler):
    """Writes tensors as arrays. Torch would hand each over by a file of its own, which takes a millisecond: a sample has a
    dozen small ones.
    """

    def reducer_override(self, item: Any) -> Any:
        return (torch.from_numpy, (item.numpy(),)) if isinstance(item, torch.Tensor) else NotImplemented


def _as_bytes(result: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(result)
    return stream.getvalue()


__all__ = ["BagelDataLoader"]
