# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Texts that are written token by token, those of several sessions in one batch that they join and leave at any token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from transformers_bagel.cache import GROWTH, copy_cache, cut_cache, join_caches, kept_whole
from transformers_bagel.sequence import SequenceLayout

from .contexts import MAX_JOINED_TOKENS, BagelContext, ContextReader, TextSettings, Written, bucket_by_length


class Text:
    """
    A text in the making: what is done to its scores, its draws and its end are its own, and those of `generate`.

    Args:
        reader (`ContextReader`)
        context ([`BagelContext`]): What it is written behind, the token that starts it included.
        settings ([`TextSettings`])

    Attributes:
        tokens (`list[int]`): Behind the one that starts it.
        has_ended (`bool`)
    """

    def __init__(self, reader: ContextReader, context: BagelContext, settings: TextSettings):
        self.reader, self.context, self.settings = reader, context, settings
        self.tokens: list[int] = []
        self.has_ended = False
        self.batch: _Batch | None = None
        self.place = 0
        stops = reader.transformer.generation_config.eos_token_id
        self._stops = set(stops if isinstance(stops, list) else [stops])
        self._ids = context.token_ids.to(reader.device)
        self._processors, self._stopping = self._as_generate_would()
        self._generator = settings.random_numbers(reader.device)
        if settings.streamer is not None:
            settings.streamer.put(self._ids.cpu())

    def _as_generate_would(self) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
        """All that is done to scores, and what ends the text beside its length and the tokens that do."""
        own = self.settings
        found: list[tuple[LogitsProcessorList, StoppingCriteriaList]] = []

        def prepared(
            model: object,
            input_ids: torch.Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            **_: object,
        ) -> torch.Tensor:
            found.append((logits_processor, stopping_criteria))
            return input_ids

        # Nothing is written: `generate` gives out what it would have used.
        self.reader.transformer.generate(
            input_ids=self._ids,
            mm_token_type_ids=self.context.token_types.to(self._ids.device),
            attention_mask=torch.ones_like(self._ids),
            max_new_tokens=own.max_new_tokens,
            logits_processor=own.logits_processor,
            stopping_criteria=own.stopping_criteria,
            custom_generate=prepared,
            **own.sampling,
        )
        ((processors, stopping),) = found
        counted = (MaxLengthCriteria, EosTokenCriteria)
        given = own.stopping_criteria
        return processors, StoppingCriteriaList(
            item for item in stopping if not isinstance(item, counted) or any(item is other for other in given)
        )

    @property
    def cache(self) -> DynamicCache:
        """Of the context, the token that starts the text, and all tokens but the last."""
        return self.context.own_cache if self.batch is None else self.batch.cache_of(self)

    @property
    def length(self) -> int:
        """Tokens of the cache."""
        return self.context.length + max(len(self.tokens) - 1, 0)

    def take(self, scores: torch.Tensor) -> None:
        """Choose the next token by its scores `(1, vocabulary)`."""
        own = self.settings
        scores = self._processors(self._ids, scores.float())
        if own.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        else:
            token = scores.argmax(-1, keepdim=True)
        self.tokens.append(int(token))
        if self._processors or self._stopping:
            self._ids = torch.cat([self._ids, token], dim=1)
        if own.streamer is not None:
            own.streamer.put(token[0].cpu())
        is_end = self.tokens[-1] in self._stops or len(self.tokens) == own.max_new_tokens
        # They are asked at each token, since some count.
        self.has_ended = is_end
        if self._stopping and self._stopping(self._ids, None).all():
            self.has_ended = True
        if self.has_ended and own.streamer is not None:
            own.streamer.end()

    @property
    def written(self) -> Written:
        """The text, with a cache that holds nothing of others."""
        is_alone = self.batch is None or self.batch.size == 1
        return Written(self.tokens, self.cache if is_alone else copy_cache(self.cache))


class _Batch:
    """
    Texts that are written together as long as none joins and none leaves. Then another one is made of their caches.

    It goes with the last of its texts, each of which knows it, and it none of them.

    Attributes:
        size (`int`): Texts.
    """

    def __init__(self, texts: Sequence[Text]):
        caches = [text.cache for text in texts]
        longest = max(text.length for text in texts)
        self.size = len(texts)
        self._padding = [longest - text.length for text in texts]
        # A single one grows as it is.
        self._cache = caches[0] if len(texts) == 1 else join_caches(caches)
        for place, text in enumerate(texts):
            text.batch, text.place = self, place

    def holds(self, texts: Sequence[Text]) -> bool:
        """Whether it is of these texts and no others."""
        return len(texts) == self.size and all(text.batch is self for text in texts)

    def cache_of(self, text: Text) -> DynamicCache:
        """A view of what is a text's own."""
        if self.size == 1:
            return self._cache
        return cut_cache(self._cache, text.place, self._padding[text.place], text.length)

    def scores(self, texts: Sequence[Text]) -> torch.Tensor:
        """Feed the last token of each text, in their places; the scores of the next ones, `(texts, vocabulary)`."""
        reader = texts[0].reader
        ids = torch.tensor([text.tokens[-1:] for text in texts])
        positions = torch.tensor([[text.context.next_position + len(text.tokens) - 1] for text in texts])
        mask = None
        if any(self._padding):
            places = torch.arange(self._padding[0] + texts[0].length + 1)
            mask = (places >= torch.tensor(self._padding)[:, None]).long().to(reader.device, non_blocking=True)
        with kept_whole(self._cache), reader.adapters.applied():
            outputs = reader.transformer(
                input_ids=ids.to(reader.device, non_blocking=True),
                attention_mask=mask,
                position_ids=positions.to(reader.device, non_blocking=True),
                past_key_values=self._cache,
                use_cache=True,
                # Whatever was written, it is no image.
                layout=SequenceLayout(torch.zeros_like(ids)),
                **reader.adapters.attention_kwargs,
            )
        return outputs.logits[:, -1]


def write_together(texts: Sequence[Text]) -> list[torch.Tensor]:
    """
    Feed the last token of several texts to the model.

    Args:
        texts (`Sequence[Text]`): Of one model, none of which has ended.

    Returns:
        `list[torch.Tensor]`: Of each, the scores `(1, vocabulary)` of the next token.
    """
    found: dict[int, torch.Tensor] = {}
    # In whole pieces of space, so that a batch stays together for some time.
    lengths = [(text.length // GROWTH + 1) * GROWTH for text in texts]
    for places in bucket_by_length(lengths, MAX_JOINED_TOKENS):
        own = [texts[place] for place in places]
        batch = own[0].batch
        if batch is None or not batch.holds(own):
            batch = _Batch(own)
        own.sort(key=lambda text: text.place)
        scores = batch.scores(own)
        found |= {id(text): scores[text.place : text.place + 1] for text in own}
    return [found[id(text)] for text in texts]
