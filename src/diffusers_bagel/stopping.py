# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Words that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


class StopAt(StoppingCriteria):
    """
    Ends a text behind any of some words, where transformers' `StopStringCriteria` does, which first looks through the whole
    vocabulary for each new word: a stranger must not ask for that.

    Args:
        words (`Sequence[str]`)
        tokenizer (`PreTrainedTokenizerBase`)
    """

    def __init__(self, words: Sequence[str], tokenizer: Any):
        self.words, self.tokenizer = words, tokenizer
        # A token is a byte at least. Of the first, and of the last, only a part may belong to the word.
        self._tokens = max(len(word.encode()) for word in words) + 2

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        ends = [self._ends(ids[-self._tokens :]) for ids in input_ids]
        return torch.tensor(ends, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]

    def _ends(self, ids: torch.Tensor) -> bool:
        now = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if not any(word in now for word in self.words):
            return False
        # What was there before the last token, maybe in the prompt, ends nothing.
        before = self.tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
        return any(now.count(word) > before.count(word) for word in self.words)
