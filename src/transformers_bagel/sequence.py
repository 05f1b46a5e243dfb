# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""From segments to tensors: the types of the tokens decide blocks, rope positions, expert routing and masks.

Text is causal. An image is a block of `N + 2` tokens (start marker, N patches, end marker) which sees everything before
it and all of itself, and which takes a single rope position. Latent patches go through the generation expert
(`*_moe_gen`); everything else, markers included, through the understanding expert.
Source: original behaviour, points 1-10 and 31-33.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.utils import is_torchdynamo_compiling

from .segments import IMAGE_TOKEN, LATENT_TOKEN, TEXT_TOKEN, EncodedSegment


def token_types_from_ids(input_ids: torch.Tensor, image_token_id: int, latent_token_id: int) -> torch.Tensor:
    """Type of every token, read off its placeholder id. `(batch, tokens)` -> `(batch, tokens)`."""
    types = torch.full_like(input_ids, TEXT_TOKEN)
    types = types.masked_fill(input_ids == image_token_id, IMAGE_TOKEN)
    return types.masked_fill(input_ids == latent_token_id, LATENT_TOKEN)


def image_block_ids(token_types: torch.Tensor) -> torch.Tensor:
    """Number the image blocks of each sample, markers included; text is -1. `(batch, tokens)` -> `(batch, tokens)`.

    Patches of two images are never adjacent: markers separate them.
    """
    patches = token_types != TEXT_TOKEN
    before = nn.functional.pad(patches, (1, 0))[:, :-1]
    after = nn.functional.pad(patches, (0, 1))[:, 1:]
    # A block opens at its start marker, the token before the first patch, or at the patch itself in column 0.
    opens = after & ~patches
    opens[:, 0] |= patches[:, 0]
    block = opens.cumsum(-1) - 1
    return torch.where(patches | before | after, block, -1)


def blocks_per_sample(token_types: torch.Tensor, kind: int) -> torch.Tensor:
    """Number of image blocks of one kind in each sample of a batch. `(batch, tokens)` -> `(batch,)`."""
    patches = token_types == kind
    return (patches & ~nn.functional.pad(patches, (1, 0))[:, :-1]).sum(-1)


def rope_positions(
    token_types: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    noised: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    skipped: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rope position of every token: a text token advances it by one, an image block as a whole by one.

    A noised block does not advance it: the clean copy that follows stands at the same position (points 8 and 33).
    An image that was dropped for guidance training leaves its position empty (point 33).

    Args:
        token_types (`torch.LongTensor` of shape `(batch, tokens)`): Text, image or latent.
        attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 0 at padding, which takes no position.
        noised (`torch.BoolTensor` of shape `(batch, tokens)`, *optional*): Latent tokens that carry noise.
        document_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
            Sample of every token of a packed sequence; positions start again with each sample.
        skipped (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
            Positions to leave empty just before a token.

    Returns:
        `torch.LongTensor` of shape `(batch, tokens)`.
    """
    patches = token_types != TEXT_TOKEN
    closes = nn.functional.pad(patches, (1, 0))[:, :-1] & ~patches
    if noised is not None:
        closes &= ~nn.functional.pad(noised, (1, 0))[:, :-1]
    advance = torch.where((image_block_ids(token_types) < 0) | closes, 1, 0)
    if attention_mask is not None:
        advance = advance.masked_fill(attention_mask == 0, 0)
    positions = advance.cumsum(-1) - advance
    if skipped is None:
        skipped = torch.zeros_like(positions)
    positions = positions + skipped.cumsum(-1) - skipped
    if document_ids is not None:
        first = torch.ones_like(document_ids, dtype=torch.bool)
        first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        positions = positions - positions.masked_fill(~first, 0).cummax(-1).values
    return positions + skipped


def document_runs(document_ids: torch.Tensor) -> torch.Tensor:
    """Number the samples over the whole batch, -1 at padding. `(batch, tokens)` -> `(batch, tokens)`.

    Adjacent tokens with the same id are one sample; negative ids are padding.
    """
    first = torch.ones_like(document_ids)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    runs = first.flatten().cumsum(0).view_as(first) - 1
    return runs.masked_fill(document_ids < 0, -1)


def patch_grid_ids(grid_hw: torch.Tensor, side: int, interpolate: bool = False) -> torch.Tensor:
    """Rows of a `side * side` position table for packed patch grids (point 10).

    Args:
        grid_hw (`torch.LongTensor` of shape `(images, 2)`): Rows and columns of each grid.
        side (`int`): Side of the table.
        interpolate (`bool`): Spread each grid over the whole table by buckets, instead of `row * side + column`.

    Returns:
        `torch.LongTensor` of shape `(sum of rows * columns,)`.

    Raises:
        ValueError: if a grid is larger than the table and is not interpolated.
    """
    grids = [tuple(grid) for grid in grid_hw.tolist()]
    ids_of = {}
    for rows, columns in set(grids):
        if max(rows, columns) > side and not interpolate:
            raise ValueError(
                f"An image of {rows} x {columns} patches (height x width) is larger than the position table of "
                f"{side} x {side}. Make the image smaller."
            )
        row, column = _axis_ids(rows, side, interpolate), _axis_ids(columns, side, interpolate)
        ids_of[rows, columns] = (row[:, None] * side + column).flatten()
    return torch.cat([torch.empty(0, dtype=torch.long), *map(ids_of.get, grids)]).to(grid_hw.device)


def _axis_ids(count: int, side: int, interpolate: bool) -> torch.Tensor:
    if not interpolate:
        return torch.arange(count)
    # float32 boundaries and right-open buckets: the original code's rounding decides at the edges.
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / count), boundaries, right=True)


@dataclass(frozen=True)
class EncodedSequence:
    """Segments as one sequence of tokens, on the CPU; every field is of shape `(tokens,)`.

    Attributes:
        input_ids, labels, token_types, position_ids (`torch.LongTensor`): See [`BagelForConditionalGeneration.forward`].
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    token_types: torch.Tensor
    position_ids: torch.Tensor


def lay_out(segments: Sequence[EncodedSegment], skipped: Sequence[int] | None = None) -> EncodedSequence:
    """
    Write segments one after the other.

    Args:
        segments (`Sequence[EncodedSegment]`): Not empty. Latents with `loss` carry noise.
        skipped (`Sequence[int]`, *optional*): Rope positions to leave empty before each segment.
    """
    types = torch.cat([segment.token_types for segment in segments])
    noised = torch.cat([(segment.token_types == LATENT_TOKEN) & segment.segment.loss for segment in segments])
    empty = torch.zeros_like(types)
    if skipped is not None:
        starts = torch.tensor([0, *map(len, segments)])[:-1].cumsum(0)
        empty[starts] = torch.tensor(skipped)
    positions = rope_positions(types[None], noised=noised[None], skipped=empty[None])[0]
    return EncodedSequence(
        torch.cat([segment.token_ids for segment in segments]),
        torch.cat([segment.labels for segment in segments]),
        types,
        positions,
    )


def _no_grids() -> torch.Tensor:
    return torch.empty(0, 2, dtype=torch.long)


@dataclass
class SequenceLayout:
    """What the types of the tokens decide, for one forward. Made on the CPU, where processor and collator know the grids.

    Attributes:
        token_types (`torch.LongTensor` of shape `(batch, tokens)`): Text, image or latent.
        noised (`torch.BoolTensor` of shape `(batch, tokens)`, *optional*): Latent tokens that carry noise.
        document_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
            Sample of each token of a packed sequence, negative at padding.
        image_grid_hw, latent_grid_hw (`torch.LongTensor` of shape `(images, 2)`):
            Rows and columns of the tokens of each image.
        labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Of a training.
    """

    token_types: torch.Tensor
    noised: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    image_grid_hw: torch.Tensor = field(default_factory=_no_grids)
    latent_grid_hw: torch.Tensor = field(default_factory=_no_grids)
    labels: torch.Tensor | None = None

    @classmethod
    def from_inputs(
        cls,
        token_types: torch.Tensor,
        image_grid_hw: torch.Tensor | None = None,
        latent_grid_hw: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> SequenceLayout:
        """The layout of a forward's arguments, which are read back from their device once each."""
        types = token_types.cpu()
        image_grid, latent_grid = (
            _no_grids() if grid is None else grid.cpu() for grid in (image_grid_hw, latent_grid_hw)
        )
        noised = None
        is_noised = None if timesteps is None else timesteps.cpu() > 0
        if is_noised is not None and bool(is_noised.any()):
            noised = torch.zeros_like(types, dtype=torch.bool)
            noised.masked_scatter_(types == LATENT_TOKEN, is_noised.repeat_interleave(latent_grid.prod(-1)))
        return cls(types, noised, None if document_ids is None else document_ids.cpu(), image_grid, latent_grid)

    @property
    def is_packed(self) -> bool:
        """Whether more than causality and blocks restricts the attention."""
        return self.noised is not None or self.document_ids is not None

    @cached_property
    def has_blocks(self) -> bool:
        """Whether there may be images among the tokens; a graph does not ask."""
        return is_torchdynamo_compiling() or bool((self.token_types != TEXT_TOKEN).any())

    @cached_property
    def blocks(self) -> torch.Tensor:
        """Image block of each token, -1 for text, `(batch, tokens)`."""
        return image_block_ids(self.token_types)

    def position_ids(self, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Rope positions, `(batch, tokens)`, on the device of the mask, see [`rope_positions`]."""
        device = "cpu" if attention_mask is None else attention_mask.device
        types, noised, documents = (
            None if values is None else values.to(device)
            for values in (self.token_types, self.noised, self.document_ids)
        )
        return rope_positions(types, attention_mask, noised, documents)

    def block_ids(self, past: int = 0) -> torch.Tensor:
        """Image block of each token, -1 for text, `(batch, past + tokens)`; what a cache holds counts as text."""
        return nn.functional.pad(self.blocks, (past, 0), value=-1)

    def noised_blocks(self) -> torch.Tensor:
        """Tokens of noised blocks, markers included, `(batch, tokens)`."""
        if self.noised is None:
            return torch.zeros_like(self.blocks, dtype=torch.bool)
        # Slot 0 collects the text tokens (block -1), which are never noised.
        counts = torch.zeros(self.blocks.shape[0], self.blocks.shape[1] + 1, dtype=torch.long)
        counts.scatter_add_(1, self.blocks + 1, self.noised.long())
        return (counts.gather(1, self.blocks + 1) > 0) & (self.blocks >= 0)

    def visibility(self, device: torch.device | str = "cpu") -> Callable[..., torch.Tensor]:
        """The part of the mask that is neither causality nor the blocks (point 32), as a mask function.

        A key is visible outside its own block unless it carries noise or belongs to another sample.
        """
        hidden = self.noised_blocks().to(device)
        no_documents = self.document_ids is None
        documents = torch.zeros_like(self.token_types) if no_documents else document_runs(self.document_ids)
        documents = documents.to(device)

        def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return ~hidden[batch, key] & (documents[batch, query] == documents[batch, key])

        return visible

    def sample_masks(self) -> list[tuple[int, int, torch.Tensor | None]]:
        """Start, stop and mask of every sample of packed sequences, counted over the flattened batch.

        Returns:
            `list[tuple[int, int, torch.BoolTensor | None]]`: The mask `(length, length)` tells what each token sees;
            `None` for a text, which is causal.
        """
        assert self.document_ids is not None
        documents, counts = document_runs(self.document_ids).flatten().unique_consecutive(return_counts=True)
        visible = self.visibility()
        samples: list[tuple[int, int, torch.Tensor | None]] = []
        stop = 0
        for document, length in zip(documents.tolist(), counts.tolist(), strict=True):
            start, stop = stop, stop + length
            if document < 0:
                continue
            index, first = divmod(start, self.token_types.shape[1])
            block = self.blocks[index, first : first + length]
            if not (block >= 0).any():
                samples.append((start, stop, None))
                continue
            tokens = torch.arange(first, first + length)
            query, key = tokens[:, None], tokens[None, :]
            own_block = (block[:, None] == block[None, :]) & (block >= 0)[:, None]
            samples.append((start, stop, ((query >= key) & visible(index, 0, query, key)) | own_block))
        return samples

    def chunks(self) -> list[tuple[int, int, bool]]:
        """Chunks `(start, stop, is_block)` of one kind of attention: causal text, or one image block.

        Raises:
            ValueError: if the samples of the batch are cut differently.
        """
        if not (self.blocks == self.blocks[:1]).all():
            raise ValueError(
                "Flash attention takes no block mask, and the samples of this batch have their images at different "
                'places. Pass them one by one, or load the model with `attn_implementation="sdpa"`.'
            )
        ids = self.blocks[0].tolist()
        starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1]]
        return [(start, stop, ids[start] >= 0) for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]


def areas(grid: torch.Tensor) -> list[int]:
    """Tokens of each image of a grid `(images, 2)` on the CPU. Multiplied here, or `torch.export` would not know them."""
    return [rows * columns for rows, columns in grid.tolist()]


def grids_of_frames(image_grid_hw: Any, image_grid_thw: Any) -> Any:
    """Rows and columns of images, `(images, 2)`, also from grids `(images, 3)` that begin with a number of frames.

    Raises:
        ValueError: if it is not 1.
    """
    if image_grid_thw is None or image_grid_hw is not None:
        return image_grid_hw
    if image_grid_thw.ndim != 2 or image_grid_thw.shape[1] != 3 or not bool((image_grid_thw[:, 0] == 1).all()):
        raise ValueError("`image_grid_thw` must be of shape (images, 3), with 1 first: BAGEL reads no videos.")
    return image_grid_thw[:, 1:]


def host_grids(
    layout: SequenceLayout | None, image_grid_hw: Any, latent_grid_hw: Any, image_grid_thw: Any = None
) -> tuple[Any, Any]:
    """The grids of a forward on the CPU, where they are read: those of the layout, if there is one."""
    image_grid_hw = grids_of_frames(image_grid_hw, image_grid_thw)
    if layout is not None:
        return layout.image_grid_hw, layout.latent_grid_hw
    image, latent = (
        grid.cpu() if isinstance(grid, torch.Tensor) else grid for grid in (image_grid_hw, latent_grid_hw)
    )
    return image, latent


@dataclass
class ExpertRouting:
    """Which tokens take which expert, and where they stand.

    Inside the decoder layers, tokens with latents among them are flat, `(tokens, hidden)`, and in expert order: those of
    the understanding expert first, so that each expert works on one contiguous slice. Only attention needs the order of
    the sequence back.

    Attributes:
        num_und (`int`): How many tokens, in expert order, take the understanding expert.
        shape (`tuple[int, int]`): `(batch, tokens)` of the sequence.
        order (`torch.LongTensor` of shape `(batch * tokens,)`, *optional*):
            Place in the flattened sequence of each token in expert order; `None` if attention needs no other order.
        inverse (`torch.LongTensor` of shape `(batch * tokens,)`, *optional*): The inverse of `order`.
        block_lengths (`tuple[int, ...]`): Latent tokens of each block of a denoising step, see `from_blocks`.
        freeze_und (`bool`): Whether the understanding expert leaves no graph behind (point 35).
    """

    num_und: int
    shape: tuple[int, int]
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    block_lengths: tuple[int, ...] = ()
    freeze_und: bool = False

    @classmethod
    def from_token_types(
        cls, token_types: torch.Tensor, freeze_und: bool = False, device: torch.device | str = "cpu"
    ) -> ExpertRouting:
        """Routing of a sequence by the types of its tokens, `(batch, tokens)` on the CPU; the indices are for a device."""
        latent = token_types.flatten() == LATENT_TOKEN
        order = torch.sort(latent.long(), stable=True).indices
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        num_und = int((~latent).sum())
        order, inverse = (indices.to(device, non_blocking=True) for indices in (order, inverse))
        return cls(num_und, tuple(token_types.shape), order, inverse, freeze_und=freeze_und)

    @classmethod
    def from_blocks(cls, block_lengths: Sequence[int]) -> ExpertRouting:
        """Routing of noised blocks alone: the markers of all blocks, then the latents of all blocks.

        All tokens of a block stand at one rope position and see each other, so their order is free; this one needs
        no index at all.
        """
        num_markers = 2 * len(block_lengths)
        return cls(num_markers, (1, num_markers + sum(block_lengths)), block_lengths=tuple(block_lengths))

    def block_slices(self) -> Iterator[tuple[slice, slice]]:
        """Where the markers of each block stand among all markers, and its latents among all latents."""
        start = 0
        for index, length in enumerate(self.block_lengths):
            yield slice(2 * index, 2 * index + 2), slice(start, start + length)
            start += length

    def to_expert_order(self, sequence: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, ...)` in the order of the sequence -> `(batch * tokens, ...)` in expert order."""
        sequence = sequence.flatten(0, 1)
        # A model may be spread over several devices, and the indices lie on one of them.
        return sequence if self.order is None else sequence.index_select(0, self.order.to(sequence.device))

    def to_sequence(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch * tokens, ...)` in expert order -> `(batch, tokens, ...)` in the order of the sequence."""
        if self.inverse is not None:
            tokens = tokens.index_select(0, self.inverse.to(tokens.device))
        return tokens.unflatten(0, self.shape)


def split_experts(routing: ExpertRouting | None, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tokens of each expert, as views: all in one without latents (`routing=None`), which keep their shape."""
    if routing is None:
        return (tokens,)
    # One split, since the gradient of each of two slices would be a tensor as large as all tokens.
    return tokens.split([routing.num_und, tokens.shape[0] - routing.num_und])


def join_experts(tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tokens of all experts in one tensor; those of a single one are not copied."""
    return tokens[0] if len(tokens) == 1 else torch.cat(list(tokens))


def route(
    routing: ExpertRouting | None, tokens: Sequence[Any], und: Callable[[Any], Any], gen: Callable[[Any], Any]
) -> tuple[Any, ...]:
    """
    Send the tokens of each expert through its layer.

    Args:
        routing (`ExpertRouting`, *optional*): By which `split_experts` split the tokens.
        tokens (`Sequence`): What `und` and `gen` take; one item without latents.
        und (`Callable`), gen (`Callable`): The layer of each expert.

    Returns:
        `tuple`: What each layer returned.
    """
    if routing is None:
        return (und(tokens[0]),)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not routing.freeze_und):
        und_states = und(tokens[0])
    return und_states, gen(tokens[1])
