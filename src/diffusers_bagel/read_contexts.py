# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a session has read: contexts that go on from each other, each of whose tokens is kept once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from transformers import DynamicCache

from transformers_bagel import fork_cache
from transformers_bagel.cache import level_cache
from transformers_bagel.segments import EncodedSegment

from .contexts import BagelContext, ContextReader


# Most tokens of a context that are copied so that fewer, with which it begins like another, are kept once.
MAX_COPIED_TOKENS = 4096


class ReadContexts:
    """Contexts that were read. One that begins like another goes on from there."""

    def __init__(self, contexts: Sequence[BagelContext] = ()):
        self._contexts = list(contexts)

    @property
    def is_empty(self) -> bool:
        return not self._contexts

    def fork(self) -> ReadContexts:
        """The same contexts, which grow on their own. Nothing is copied until they do."""
        caches: dict[int, DynamicCache] = {}

        def forked(context: BagelContext) -> BagelContext:
            if context.cache is None:
                return context
            key = id(context.cache)
            if key not in caches:
                caches[key] = fork_cache(context.cache)
                # In another thread, a forward may be writing into the layers.
                level_cache(caches[key])
            prefix = None if context.prefix is None else forked(context.prefix)
            return replace(context, cache=caches[key], prefix=prefix)

        return ReadContexts([forked(context) for context in self._contexts])

    def context(self, reader: ContextReader, segments: Sequence[EncodedSegment]) -> BagelContext:
        """The context of some segments; what no other has read is read now."""
        nearest = self.nearest(segments)
        missing = segments[len(nearest.segments) :]
        if not missing and nearest.held == nearest.length:
            return nearest
        (context,) = reader.read([nearest], [missing])
        self.keep(context)
        return context

    def nearest(self, segments: Sequence[EncodedSegment]) -> BagelContext:
        """The context of as many of the segments as any has read."""
        best = BagelContext()
        for context in self._contexts:
            common = context.common(segments)
            if common > len(best.segments):
                best = context if common == len(context.segments) else context.first(common)
        return best

    def forget_all_but(self, segments: Sequence[Sequence[EncodedSegment]]) -> None:
        """Forget what none of these lists of segments begins with, and keep the keys and values of each token once."""
        places = {id(context.cache): place for place, context in enumerate(self._contexts)}
        wanted: list[BagelContext] = []
        for context in sorted(map(self.nearest, segments), key=lambda context: -context.length):
            if context.segments and not any(context.begins(other) for other in wanted):
                wanted.append(context)
        kept: list[BagelContext] = []
        # The one that was read last stays as it is, since the next turn often goes on from there.
        for context in sorted(wanted, key=lambda context: -places[id(context.cache)]):
            beginnings = [other.first(other.common(context.segments)) for other in kept]
            longest = max(beginnings, key=lambda beginning: beginning.length, default=BagelContext())
            if longest.length and context.held - longest.length <= max(longest.length, MAX_COPIED_TOKENS):
                context = context.behind(longest)
            kept.append(context.cut())
        self._contexts = kept[::-1]

    def tensors(self) -> Iterator[torch.Tensor]:
        """All keys and values that are kept, some of them more than once."""
        for context in self._contexts:
            each: BagelContext | None = context
            while each is not None:
                for layer in () if each.cache is None else each.cache.layers:
                    yield from (layer.keys, layer.values)
                each = each.prefix

    def keep(self, context: BagelContext) -> None:
        """Remember a context, and none that it begins with: its cache has their tokens."""
        self._contexts = [other for other in self._contexts if not other.begins(context)] + [context]
