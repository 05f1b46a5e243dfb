# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Texts of several sessions in one `generate`, each of which is what it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from transformers_bagel.cache import copy_cache, join_caches, split_cache
from transformers_bagel.segments import START

from .contexts import MAX_JOINED_TOKENS, BagelContext, ContextReader, TextSettings, Written, bucket_by_length


class _Sample:
    """One of several texts: its scores, draws and end are its own.

    Args:
        settings ([`TextSettings`])
        padding (`int`): Tokens before its first, in the ids of all.
        prompt (`int`): Tokens of the ids of all before what is written.
        warpers (`LogitsProcessorList`, *optional*): What is done to scores before a token is drawn; `None` draws none.
        stops (`set[int]`): Tokens that end a text.
        device (`torch.device`)

    Attributes:
        count (`int`, *optional*): Tokens that were written, once it has ended.
        error (`Exception`, *optional*): By which it has ended.
    """

    def __init__(
        self,
        settings: TextSettings,
        padding: int,
        prompt: int,
        warpers: LogitsProcessorList | None,
        stops: set[int],
        device: torch.device,
    ):
        self.settings, self.padding, self.prompt, self.stops = settings, padding, prompt, stops
        self.warpers = warpers
        # The same numbers as those of the global state under this seed.
        self.generator = None if settings.seed is None else torch.Generator(device).manual_seed(settings.seed)
        self.count: int | None = None
        self.error: Exception | None = None

    def scored(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Its scores `(1, vocabulary)`, by which the best token is the one to be written."""
        if self.count is not None:
            return scores
        ids = ids[:, self.padding :]
        try:
            scores = self.settings.logits_processor(ids, scores)
            if self.warpers is None:
                return scores
            probabilities = self.warpers(ids, scores).softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=self.generator)
            return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
        except (
            Exception
        ) as error:  # Of the caller's processors. The others go on, and it is raised when they are done.
            self.error = error
            return scores

    def has_ended(self, ids: torch.Tensor, last: int) -> bool:
        """Whether no more is written of it behind its last token."""
        if self.count is None:
            count = ids.shape[1] - self.prompt
            is_end = self.error is not None or count == self.settings.max_new_tokens or last in self.stops
            if is_end or self._is_stopped(ids):
                self.count = count
        return self.count is not None

    def _is_stopped(self, ids: torch.Tensor) -> bool:
        try:
            return bool(self.settings.stopping_criteria(ids[:, self.padding :], None).all())
        except Exception as error:  # As above.
            self.error = error
            return True


def write_together(
    reader: ContextReader, contexts: Sequence[BagelContext], settings: Sequence[TextSettings]
) -> list[Written | Exception]:
    """
    What the model writes behind each context, all of which stay as they are.

    Args:
        reader (`ContextReader`)
        contexts (`Sequence[BagelContext]`)
        settings (`Sequence[TextSettings]`): Of each text; none is streamed, and `temperature_only` is the same for all.

    Returns:
        `list[Written | Exception]`: What was written, or the error of the caller's by which it ended.
    """
    lengths = [context.length + own.max_new_tokens for context, own in zip(contexts, settings, strict=True)]
    written: dict[int, Written | Exception] = {}
    for batch in bucket_by_length(lengths, MAX_JOINED_TOKENS):
        if len(batch) == 1:
            written[batch[0]] = reader.write_on(contexts[batch[0]], settings[batch[0]])
        else:
            found = _written(reader, [contexts[index] for index in batch], [settings[index] for index in batch])
            written |= dict(zip(batch, found, strict=True))
    return [written[index] for index in range(len(contexts))]


def _written(
    reader: ContextReader, contexts: Sequence[BagelContext], settings: Sequence[TextSettings]
) -> list[Written | Exception]:
    read = reader.read(contexts, [()] * len(contexts))
    longest = max(context.length for context in read)
    stops = reader.transformer.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    samples = [
        _Sample(
            own,
            longest - context.length,
            longest + 1,
            _warpers(reader, own) if own.do_sample else None,
            stops,
            reader.device,
        )
        for context, own in zip(read, settings, strict=True)
    ]

    def scored(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = zip(samples, ids.split(1), scores.split(1), strict=True)
        return torch.cat([sample.scored(own, own_scores) for sample, own, own_scores in rows])

    def have_ended(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = zip(samples, ids.split(1), ids[:, -1].tolist(), strict=True)
        return torch.tensor([sample.has_ended(own, last) for sample, own, last in rows], device=ids.device)

    tokens, cache = reader.generate(
        read,
        join_caches([context.own_cache for context in read if context.own_cache is not None]),
        max_new_tokens=max(own.max_new_tokens for own in settings),
        do_sample=False,
        logits_processor=LogitsProcessorList([scored]),
        stopping_criteria=StoppingCriteriaList([have_ended]),
        **replace(settings[0], do_sample=False).limits,
    )
    lengths = [context.length + (sample.count or 0) for context, sample in zip(read, samples, strict=True)]
    caches = split_cache(cache, [sample.padding for sample in samples], lengths)
    return [
        sample.error or Written(own[: sample.count], copy_cache(own_cache))
        for sample, own, own_cache in zip(samples, tokens, caches, strict=True)
    ]


def _warpers(reader: ContextReader, settings: TextSettings) -> LogitsProcessorList:
    """What `generate` does to scores, behind the caller's processors, before it draws a token."""
    start = torch.tensor([[reader.processor.tokenizer.convert_tokens_to_ids(START)]], device=reader.device)

    def mark(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores

    def prepared(model: object, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, **_: object) -> object:
        return logits_processor

    # Nothing is written: `generate` gives out what it would have used.
    processors = reader.transformer.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=1,
        do_sample=True,
        temperature=settings.temperature,
        logits_processor=LogitsProcessorList([mark]),
        custom_generate=prepared,
        **settings.limits,
    )
    return LogitsProcessorList(processors[processors.index(mark) + 1 :])
