# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Context split: several processes compute one denoising step, each a part of the latents of every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from .cache import PrefixCache, PrefixLayer, PrefixView


class SplitPrefixCache(PrefixCache):
    """A [`PrefixCache`] of blocks whose latents are split over the processes of a group.

    A process computes the queries of the markers and of its share of the latents. In each layer the keys and values of
    all processes are gathered into the scratch space behind the prefix, which every process holds in full. Keys may
    stand in any order, since each carries its rope position. Every process gets the velocity of all latents.

    Args:
        views (`Sequence[PrefixView]`): One view for each block of the batch.
        lengths (`Sequence[int]`): Latent tokens of each block.
        group (`torch.distributed.ProcessGroup`): The processes, which must all be called with the same inputs.
    """

    def __init__(self, views: Sequence[PrefixView], lengths: Sequence[int], group: distributed.ProcessGroup):
        super().__init__(views)
        self.lengths = list(lengths)
        self.group = group

    def select(self, indices: Sequence[int]) -> SplitPrefixCache:
        """The cache of some of the views. Nothing is copied."""
        return SplitPrefixCache(
            [self.views[index] for index in indices], [self.lengths[index] for index in indices], self.group
        )

    def counts(self) -> list[list[int]]:
        """For each block the number of latents of each process; they differ by one at most."""
        size = self.group.size()
        return [[length // size + (rank < length % size) for rank in range(size)] for length in self.lengths]

    def own_lengths(self) -> list[int]:
        """For each block the number of latents of this process."""
        return [counts[self.group.rank()] for counts in self.counts()]

    def own_part(self, packed: torch.Tensor) -> torch.Tensor:
        """The share of this process of what all latents have, `(latent_tokens, ...)`."""
        pieces = packed.split([count for counts in self.counts() for count in counts])
        return torch.cat(pieces[self.group.rank() :: self.group.size()])

    def gather(self, packed: torch.Tensor) -> torch.Tensor:
        """The inverse of `own_part`."""
        pieces = zip(packed.split(self.own_lengths()), self.counts(), strict=True)
        return torch.cat([part for own, counts in pieces for part in gather_parts(own, counts, self.group)])

    def layer(self, index: int) -> SplitPrefixLayer:
        """What one decoder layer attends to, as views."""
        return SplitPrefixLayer(super().layer(index).views, self.counts(), self.group)


@dataclass
class SplitPrefixLayer(PrefixLayer):
    """One layer of a [`SplitPrefixCache`].

    Attributes:
        counts (`list[list[int]]`): For each block the number of latents of each process.
        group (`torch.distributed.ProcessGroup`)
    """

    counts: list[list[int]]
    group: distributed.ProcessGroup

    def extend(
        self, branch: int, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like the parent's; the pieces are the markers, which every process has, and this process's latents."""
        own = torch.stack([keys[1], values[1]], dim=1)
        parts = gather_parts(own, self.counts[branch], self.group)
        return super().extend(
            branch,
            [keys[0], *(part[:, 0] for part in parts)],
            [values[0], *(part[:, 1] for part in parts)],
        )


def gather_parts(own: torch.Tensor, counts: Sequence[int], group: distributed.ProcessGroup) -> list[torch.Tensor]:
    """
    The parts of all processes.

    Args:
        own (`torch.Tensor` of shape `(tokens, ...)`): The part of this process.
        counts (`Sequence[int]`): Tokens of each process.
        group (`torch.distributed.ProcessGroup`)
    """
    if own.requires_grad:
        raise RuntimeError("A context split passes no gradients on. Call the model under `torch.no_grad()`.")
    # A collective takes parts of one size.
    padded = torch.nn.functional.pad(own.flatten(1), (0, 0, 0, max(counts) - len(own)))
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded, group=group)
    return [part[:count].unflatten(1, own.shape[1:]) for part, count in zip(parts, counts, strict=True)]


__all__ = ["SplitPrefixCache"]
