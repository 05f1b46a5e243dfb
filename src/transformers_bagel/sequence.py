# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL's sequence, described once: from the type of every token follow blocks, positions, routing and mask.

A sequence is a row of segments. Text is causal. An image is a block of `N + 2` tokens (start marker, N patches, end
marker) which sees everything before it and all of itself, and which takes a single rope position. Latent patches go
through the generation expert (`*_moe_gen`); everything else, markers included, through the understanding expert.
Source: published behaviour, points 1-10 and 31-33.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import is_torchdynamo_compiling


# Values of `mm_token_type_ids`. The library reserves 1 for images, 2 for videos and 3 for audio.
TEXT_TOKEN = 0
IMAGE_TOKEN = 1
LATENT_TOKEN = 4


def token_types_from_ids(input_ids: torch.Tensor, image_token_id: int, latent_token_id: int) -> torch.Tensor:
    """Type of every token, read off its placeholder id. `(batch, tokens)` -> `(batch, tokens)`."""
    types = torch.full_like(input_ids, TEXT_TOKEN)
    types = types.masked_fill(input_ids == image_token_id, IMAGE_TOKEN)
    return types.masked_fill(input_ids == latent_token_id, LATENT_TOKEN)


def image_block_ids(token_types: torch.Tensor) -> torch.Tensor:
    """Number the image blocks of each row, markers included; text is -1. `(batch, tokens)` -> `(batch, tokens)`.

    Two patches runs are never adjacent, because each block has its own two markers.
    """
    patches = token_types != TEXT_TOKEN
    before = torch.nn.functional.pad(patches, (1, 0))[:, :-1]
    after = torch.nn.functional.pad(patches, (0, 1))[:, 1:]
    # A block opens at its start marker, the token before the first patch, or at the patch itself in column 0.
    opens = after & ~patches
    opens[:, 0] |= patches[:, 0]
    block = opens.cumsum(-1) - 1
    return torch.where(patches | before | after, block, -1)


def blocks_per_row(token_types: torch.Tensor, kind: int) -> torch.Tensor:
    """Number of image blocks of one kind in each row. `(batch, tokens)` -> `(batch,)`."""
    patches = token_types == kind
    return (patches & ~torch.nn.functional.pad(patches, (1, 0))[:, :-1]).sum(-1)


def check_placeholders(token_types: torch.Tensor, kind: int, num_tokens: int, argument: str) -> None:
    """
    Raises:
        ValueError: if a batch has another number of placeholders of one kind than there are tokens for them.
    """
    if is_torchdynamo_compiling():
        return
    placeholders = int((token_types == kind).sum())
    if placeholders != num_tokens:
        raise ValueError(
            f"The sequence has {placeholders} placeholders for `{argument}`, but `{argument}` holds {num_tokens} tokens."
            " Pass exactly the images that the text refers to."
        )


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
            Sample of every token of a packed row; positions start again with each sample.
        skipped (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
            Positions to leave empty just before a token.

    Returns:
        `torch.LongTensor` of shape `(batch, tokens)`.
    """
    patches = token_types != TEXT_TOKEN
    closes = torch.nn.functional.pad(patches, (1, 0))[:, :-1] & ~patches
    advance = torch.where(image_block_ids(token_types) < 0, 1, 0)
    if noised is None:
        advance = advance.masked_fill(closes, 1)
    else:
        advance = advance.masked_fill(closes & ~torch.nn.functional.pad(noised, (1, 0))[:, :-1], 1)
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
    """Number of the sample of each token, counted over the whole batch: a sample is a run of one id in a row. Padding
    (negative ids) is -1. `(batch, tokens)` -> `(batch, tokens)`.
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
    ids = [torch.empty(0, dtype=torch.long)]
    for rows, columns in grid_hw.tolist():
        if max(rows, columns) > side and not interpolate:
            raise ValueError(
                f"An image of {rows} x {columns} patches (height x width) is larger than the position table of "
                f"{side} x {side}. Make the image smaller."
            )
        row, column = _axis_ids(rows, side, interpolate), _axis_ids(columns, side, interpolate)
        ids.append((row[:, None] * side + column).flatten())
    return torch.cat(ids).to(grid_hw.device)


def _axis_ids(count: int, side: int, interpolate: bool) -> torch.Tensor:
    if not interpolate:
        return torch.arange(count)
    # float32 boundaries and right-open buckets: the published rounding decides at the edges.
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / count), boundaries, right=True)


@dataclass
class SampleMasks:
    """Attention of packed rows, sample by sample: its memory grows with the squares of the samples, not of the row.

    Attributes:
        spans (`list[tuple[int, int]]`): Start and stop of each sample in the flattened rows; the rest is padding.
        masks (`list[torch.BoolTensor | None]`):
            What each token of a sample sees, `(length, length)`; `None` for a text, which is causal.
        shape (`tuple[int, int]`): `(batch, tokens)` of the rows.
    """

    spans: list[tuple[int, int]]
    masks: list[torch.Tensor | None]
    shape: tuple[int, int]

    def attend(
        self,
        attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """Apply an attention to each sample; padding gets zeros. All `(batch, tokens, heads, head_dim)`."""
        # Padding, sample, padding, ..., sample, padding; most of the padding is empty.
        borders = [0, *(border for span in self.spans for border in span), self.shape[0] * self.shape[1]]
        lengths = [stop - start for start, stop in itertools.pairwise(borders)]
        parts = [states.flatten(0, 1).split(lengths) for states in (query, key, value)]
        pieces = [torch.zeros_like(padding) for padding in parts[0]]
        for index, mask in enumerate(self.masks):
            place = 2 * index + 1
            sample_query, sample_key, sample_value = (states[place] for states in parts)
            pieces[place] = attention(sample_query, sample_key, sample_value, mask)
        return torch.cat(pieces).unflatten(0, self.shape)


@dataclass
class SequenceLayout:
    """Everything that the types of the tokens decide, for one forward.

    Attributes:
        token_types (`torch.LongTensor` of shape `(batch, tokens)`): Text, image or latent.
        noised (`torch.BoolTensor` of shape `(batch, tokens)`, *optional*): Latent tokens that carry noise.
        document_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Sample of each token of a packed row.
    """

    token_types: torch.Tensor
    noised: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None

    @classmethod
    def from_latents(
        cls,
        token_types: torch.Tensor,
        timesteps: torch.Tensor,
        latent_grid_hw: torch.Tensor,
        document_ids: torch.Tensor | None = None,
    ) -> SequenceLayout:
        """Layout with the noise of each latent image (its timestep, 0 is clean) spread over its tokens."""
        noised = torch.zeros_like(token_types, dtype=torch.bool)
        if bool((timesteps > 0).any()):
            per_token = (timesteps > 0).repeat_interleave(latent_grid_hw.prod(-1).to(timesteps.device))
            noised.masked_scatter_(token_types == LATENT_TOKEN, per_token.to(noised.device))
            return cls(token_types, noised, document_ids)
        return cls(token_types, None, document_ids)

    @property
    def is_packed(self) -> bool:
        """Whether more than causality and blocks restricts the attention."""
        return self.noised is not None or self.document_ids is not None

    def position_ids(self, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Rope positions, `(batch, tokens)`, see [`rope_positions`]."""
        return rope_positions(self.token_types, attention_mask, self.noised, self.document_ids)

    def block_ids(self, past: int = 0) -> torch.Tensor:
        """Image block of each token, -1 for text, `(batch, past + tokens)`; what a cache holds counts as text."""
        return torch.nn.functional.pad(image_block_ids(self.token_types), (past, 0), value=-1)

    def noised_blocks(self) -> torch.Tensor:
        """Tokens of noised blocks, markers included, `(batch, tokens)`."""
        blocks = image_block_ids(self.token_types)
        if self.noised is None:
            return torch.zeros_like(blocks, dtype=torch.bool)
        # Slot 0 collects the text tokens (block -1), which are never noised.
        counts = torch.zeros(blocks.shape[0], blocks.shape[1] + 1, dtype=torch.long, device=blocks.device)
        counts.scatter_add_(1, blocks + 1, self.noised.long())
        return (counts.gather(1, blocks + 1) > 0) & (blocks >= 0)

    def mask_function(self) -> Callable[..., torch.Tensor]:
        """The part of the mask that is neither causality nor the blocks (point 32).

        A key is visible outside its own block unless it carries noise or belongs to another sample.
        """
        hidden = self.noised_blocks()
        no_documents = self.document_ids is None
        documents = torch.zeros_like(self.token_types) if no_documents else document_runs(self.document_ids)

        def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return ~hidden[batch, key] & (documents[batch, query] == documents[batch, key])

        return visible

    def sample_masks(self) -> SampleMasks:
        """The mask of every sample of packed rows by itself."""
        assert self.document_ids is not None
        runs, counts = document_runs(self.document_ids).flatten().unique_consecutive(return_counts=True)
        lengths = counts.tolist()
        blocks, visible = image_block_ids(self.token_types), self.mask_function()
        has_images = torch.stack([(part >= 0).any() for part in blocks.flatten().split(lengths)]).tolist()
        rows, columns = self.token_types.shape
        spans: list[tuple[int, int]] = []
        masks: list[torch.Tensor | None] = []
        stop = 0
        for run, length, has_image in zip(runs.tolist(), lengths, has_images, strict=True):
            start, stop = stop, stop + length
            if run < 0:
                continue
            spans.append((start, stop))
            if not has_image:
                masks.append(None)
                continue
            row, first = divmod(start, columns)
            tokens = torch.arange(first, first + length, device=blocks.device)
            query, key = tokens[:, None], tokens[None, :]
            block = blocks[row, first : first + length]
            own_block = (block[:, None] == block[None, :]) & (block >= 0)[:, None]
            masks.append(((query >= key) & visible(row, 0, query, key)) | own_block)
        return SampleMasks(spans, masks, (rows, columns))

    def runs(self) -> list[tuple[int, int, bool]]:
        """Runs `(start, stop, is_block)` of one kind of attention: causal text, or one image block.

        Raises:
            ValueError: if the rows of the batch are cut differently.
        """
        blocks = image_block_ids(self.token_types)
        if not (blocks == blocks[:1]).all():
            raise ValueError(
                "Flash attention takes no block mask, and the rows of this batch have their images at different "
                'places. Pass the rows one by one, or load the model with `attn_implementation="sdpa"`.'
            )
        ids = blocks[0].tolist()
        starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1]]
        return [(start, stop, ids[start] >= 0) for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]


@dataclass
class Routing:
    """Which tokens take which expert, and where they stand.

    Inside the decoder layers a stream with latents is flat, `(tokens, hidden)`, understanding tokens first, so that
    each expert works on one contiguous slice. Only attention needs the order of the sequence back.

    Attributes:
        num_und (`int`): How many tokens, from the front of the stream, take the understanding expert.
        order (`torch.LongTensor` of shape `(batch * tokens,)`, *optional*):
            Place in the flattened sequence of each token of the stream; `None` if the stream is attended as it is.
        inverse (`torch.LongTensor` of shape `(batch * tokens,)`, *optional*): The inverse of `order`.
        shape (`tuple[int, int]`): `(batch, tokens)` of the sequence.
        block_lengths (`tuple[int, ...]`): Latent tokens of each block of a denoising stream, see `from_blocks`.
        freeze_und (`bool`): Whether the understanding expert leaves no graph behind (point 35).
    """

    num_und: int
    shape: tuple[int, int]
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    block_lengths: tuple[int, ...] = ()
    freeze_und: bool = False

    @classmethod
    def from_token_types(cls, token_types: torch.Tensor, freeze_und: bool = False) -> Routing:
        """Routing of a sequence of shape `(batch, tokens)` by the types of its tokens."""
        latent = token_types.flatten() == LATENT_TOKEN
        und, gen = (~latent).nonzero().squeeze(-1), latent.nonzero().squeeze(-1)
        order = torch.cat([und, gen])
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return cls(und.numel(), tuple(token_types.shape), order, inverse, freeze_und=freeze_und)

    @classmethod
    def from_blocks(cls, block_lengths: Sequence[int]) -> Routing:
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

    def to_stream(self, sequence: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, ...)` in the order of the sequence -> `(batch * tokens, ...)` in the order of the stream."""
        sequence = sequence.flatten(0, 1)
        return sequence if self.order is None else sequence.index_select(0, self.order)

    def to_sequence(self, stream: torch.Tensor) -> torch.Tensor:
        """`(batch * tokens, ...)` in the order of the stream -> `(batch, tokens, ...)` in the order of the sequence."""
        if self.inverse is not None:
            stream = stream.index_select(0, self.inverse)
        return stream.unflatten(0, self.shape)


def split_experts(routing: Routing | None, stream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tokens of each expert, as views: all in one without latents (`routing=None`), which keep their shape."""
    if routing is None:
        return (stream,)
    # One split, since the gradient of each of two slices would be a tensor as large as the stream.
    return stream.split([routing.num_und, stream.shape[0] - routing.num_und])


def join_parts(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """All parts in one tensor; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def route(
    routing: Routing | None, parts: Sequence[Any], und: Callable[[Any], Any], gen: Callable[[Any], Any]
) -> tuple[Any, ...]:
    """
    Send the tokens of each expert through its layer.

    Args:
        routing (`Routing`, *optional*): Whose `split_experts` made the parts.
        parts (`Sequence`): What `und` and `gen` take; one without latents.
        und (`Callable`), gen (`Callable`): The layer of each expert.

    Returns:
        `tuple`: What each layer returned.
    """
    if routing is None:
        return (und(parts[0]),)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not routing.freeze_und):
        und_states = und(parts[0])
    return und_states, gen(parts[1])
