# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A conversation of which each turn is read once."""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch
from transformers import Cache

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor, fork_cache
from transformers_bagel.sequence import rope_positions


class Conversation:
    """What the model has read and said. A turn that fails or is interrupted leaves it as it was.

    Args:
        model ([`BagelForConditionalGeneration`])
        processor ([`BagelProcessor`])
    """

    def __init__(self, model: BagelForConditionalGeneration, processor: BagelProcessor) -> None:
        self.model, self.processor = model, processor
        self.end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        # Ids and types of all turns, `(1, length)`, and what was computed of them.
        self.ids = self.types = torch.zeros(1, 0, dtype=torch.long)
        self.cache: Cache | None = None
        # Of the last prompt.
        self.prompt_length = 0

    @torch.no_grad()
    def send(
        self, images: list[PIL.Image.Image], text: str, *, think: bool, raw_tokens: bool, **generation: Any
    ) -> None:
        """
        Read a message, and answer.

        Args:
            images (`list[PIL.Image.Image]`): Before the text.
            text (`str`)
            think (`bool`): Whether the model is told to think, which is said once, at the beginning.
            raw_tokens (`bool`): Whether special tokens in the text are tokens.
            generation: Of `generate()`.

        Raises:
            ValueError: if the message cannot be taken.
        """
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        message = dict(
            self.processor.apply_chat_template(
                [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                think=think and self.cache is None,
                sanitize_control_tokens=not raw_tokens,
            ).to(self.model.device)
        )
        message.pop("attention_mask")
        ids = torch.cat([self.ids.to(self.model.device), message.pop("input_ids")], dim=1)
        types = torch.cat([self.types.to(self.model.device), message.pop("mm_token_type_ids")], dim=1)
        cache = None if self.cache is None else fork_cache(self.cache)
        if cache is not None and message:
            self._read(ids, types, cache, message)
            message = {}
        out = self.model.generate(
            input_ids=ids,
            mm_token_type_ids=types,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            return_dict_in_generate=True,
            **message,
            **generation,
        )
        self.ids, self.cache, self.prompt_length = out.sequences, out.past_key_values, ids.shape[1]
        if self.ids[0, -1] != self.end:
            self.ids = torch.nn.functional.pad(self.ids, (0, 1), value=self.end)
        self.types = torch.nn.functional.pad(types, (0, self.ids.shape[1] - types.shape[1]))

    def _read(self, ids: torch.Tensor, types: torch.Tensor, cache: Cache, images: dict[str, torch.Tensor]) -> None:
        """Read what the cache has not yet, but for the last token: `generate()` would ask for the images of all turns."""
        past = int(cache.get_seq_length())
        self.model(
            input_ids=ids[:, past:-1],
            mm_token_type_ids=types[:, past:-1],
            position_ids=rope_positions(types, None)[:, past:-1],
            past_key_values=cache,
            logits_to_keep=1,
            **images,
        )
