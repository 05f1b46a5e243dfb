# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A small tokenizer of Qwen2's kind, with BAGEL's special tokens."""

from __future__ import annotations

from tasks import UNDERSTANDING, sample
from transformers import Qwen2Tokenizer

from transformers_bagel.original_config import SPECIAL_TOKENS


VOCABULARY = 768
# Of every task. Those of the stages may change without giving the tokens other numbers.
SHARES = {
    "draw": 0.21,
    "think_and_draw": 0.13,
    "plan": 0.14,
    "edit": 0.35,
    "ask": 0.09,
    "describe": 0.02,
    "think_and_answer": 0.06,
}


def train_tokenizer() -> Qwen2Tokenizer:
    """Bytes and the words of the world: any text can be read, and what the world says takes a token a word."""
    texts = [
        part["text"]
        for shares in (UNDERSTANDING, SHARES)
        for index in range(3000)
        for message in sample(-1, shares, index)
        for part in message["content"]
        if part["type"] == "text"
    ]
    return Qwen2Tokenizer().train_new_from_iterator(
        texts, VOCABULARY, new_special_tokens=list(SPECIAL_TOKENS.values()), show_progress=False
    )
