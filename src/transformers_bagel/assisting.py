# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Assisted decoding: a model of text alone as the assistant of one that sees, and what each forward accepted."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, SuppressTokensLogitsProcessor


# Rows that an embedding may have beyond its tokenizer: those of the Qwen2.5 models differ by 128.
MAX_SPARE_ROWS = 512


class TextAssistant:
    """
    The `assistant_model` of one call of `generate()`: it is given the words of the conversation, and no images.

    An image is thousands of placeholders, which a model of text cannot read. Without them its sequence is shorter than the
    one that it assists, so it keeps a cache of its own, which the library would cut at the wrong place.

    Args:
        assistant (`PreTrainedModel`): What is assisted by.
        vocab_size (`int`): Tokens of the model that is assisted.
        is_word (`torch.BoolTensor` of shape `(1, tokens)`, *optional*):
            Which tokens of the prompt are words. `None` if the assistant's tokenizer is another one: then the library
            translates by the text, in which images do not occur.

    Raises:
        ValueError: if the assistant has another tokenizer.
    """

    def __init__(self, assistant: PreTrainedModel, vocab_size: int, is_word: torch.Tensor | None):
        self.assistant = assistant
        self.config = assistant.config
        self.is_word = is_word
        self._cache: DynamicCache | None = None
        self._read = torch.empty(1, 0, dtype=torch.long)
        self._vocab_size = vocab_size
        self._known = assistant.config.get_text_config().vocab_size
        if is_word is None:
            return
        if abs(self._known - vocab_size) > MAX_SPARE_ROWS:
            raise ValueError(
                f"`assistant_model` has {self._known} tokens and this model {vocab_size}, so its tokenizer is another "
                "one: take a smaller Qwen2.5, or pass `tokenizer` and `assistant_tokenizer`."
            )
        # The library takes models of equal sizes for such of one tokenizer.
        self.config = copy.deepcopy(assistant.config)
        self.config.get_text_config().vocab_size = vocab_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.assistant, name)

    def generate(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        min_new_tokens: int,
        max_new_tokens: int,
        **_: Any,
    ) -> GenerateDecoderOnlyOutput:
        """Candidates behind a sequence, as the library asks for them; what else it passes on is of images."""
        words = self._words(input_ids)
        processors = LogitsProcessorList(logits_processor)
        if self.is_word is not None and self._known > self._vocab_size:
            processors.append(SuppressTokensLogitsProcessor(range(self._vocab_size, self._known), words.device))
        out = self.assistant.generate(
            input_ids=words,
            attention_mask=torch.ones_like(words),
            generation_config=generation_config,
            logits_processor=processors,
            past_key_values=self._cache_of(words),
            min_new_tokens=min_new_tokens,
            max_new_tokens=max_new_tokens,
        )
        self._cache, self._read = out.past_key_values, out.sequences[:, :-1]
        scores = out.scores
        if self.is_word is not None:
            more = self._vocab_size - self._known
            scores = tuple(functional.pad(own, (0, more), value=-torch.inf) for own in scores)
        sequences = torch.cat([input_ids, out.sequences[:, words.shape[1] :]], dim=1)
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores)

    def _words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The ids that the assistant knows."""
        if self.is_word is None:
            return input_ids
        written = input_ids.shape[1] - self.is_word.shape[1]
        is_word = functional.pad(self.is_word.to(input_ids.device), (0, written), value=True)
        return input_ids[is_word & (input_ids < self._known)][None]

    def _cache_of(self, words: torch.Tensor) -> DynamicCache | None:
        """The cache without what it holds beyond the first words that it shares with these, and without the last one."""
        if self._cache is None:
            return None
        length = min(self._read.shape[1], words.shape[1] - 1)
        same = self._read[:, :length] == words[:, :length]
        self._cache.crop(int(same.cumprod(-1).sum()) - self._cache.get_seq_length())
        return self._cache


class ForwardCounter(BaseStreamer):
    """
    A `streamer` of `generate()` that tells how many tokens each forward of the model gave.

    Without an assistant it is one; with one, those of its candidates that were accepted, and one.

    Attributes:
        tokens (`list[int]`): Of each forward.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Count what is given; the prompt comes first."""
        if self._has_prompt:
            self.tokens.append(value.numel())
        self._has_prompt = True

    def end(self) -> None:
        """A prompt may follow."""
        self._has_prompt = False

    @property
    def rate(self) -> float:
        """Tokens of a forward, on average; 0 before the first."""
        return sum(self.tokens) / max(len(self.tokens), 1)
