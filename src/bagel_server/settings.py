# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a server allows, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class ServerSettings:
    """
    What a server allows, and how much of it.

    Attributes:
        model (`str`): The name that requests call the model by.
        api_key (`str`, *optional*): What requests to `/v1/` must bear; without one, anybody may ask.
        allow_image_urls (`bool`): Whether images are fetched from http(s) URLs of the public internet.
        raw_tokens (`bool`): Whether special tokens in what is said are tokens, and not words like others.
        protocol (`str`, *optional*): How a fine-tune answers, see [`BagelSession`].
        timeout (`float`): Seconds from a request to the end of its answer, waiting included.
        body_timeout (`float`): Seconds in which a request must have arrived.
        max_requests (`int`): That are read or answered at a time.
        max_body_bytes (`int`): Of a request.
        max_messages (`int`): In a conversation.
        max_characters (`int`): Of all texts of a request.
        max_context_tokens (`int`): Of all that was said, before an answer.
        max_new_tokens (`int`): Of each text of an answer; as many are written where a request says nothing, up to 1,024.
        max_images (`int`): In a request.
        max_image_pixels (`int`): Of each of them.
        max_pixels (`int`): Of all of them together.
        max_drawn (`int`): Pictures of an answer.
        max_choices (`int`): Answers to a request, its `n`.
        max_steps (`int`): Denoising steps of a picture.
        max_cache_bytes (`int`): Of conversations that are kept in case they go on; 0 keeps none.
    """

    model: str = "bagel"
    api_key: str | None = field(default=None, repr=False)
    allow_image_urls: bool = False
    raw_tokens: bool = False
    protocol: str | None = None
    timeout: float = 600.0
    body_timeout: float = 30.0
    max_requests: int = 128
    max_body_bytes: int = 32 * 2**20
    max_messages: int = 256
    max_characters: int = 1_000_000
    max_context_tokens: int = 32_768
    max_new_tokens: int = 4096
    max_images: int = 16
    max_image_pixels: int = 40_000_000
    max_pixels: int = 80_000_000
    max_drawn: int = 8
    max_choices: int = 10
    max_steps: int = 200
    max_cache_bytes: int = 2**30

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            least = 0 if each.name == "max_cache_bytes" else 1
            if each.name.startswith("max_") and value < least or each.name.endswith("timeout") and not value > 0:
                raise ValueError(f"`{each.name}` must be at least {least}, got {value}.")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ValueError("`api_key` must be a word in ASCII, as it is sent in a header.")
