# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Conversations and training samples as segments, and segments as tokens.

A sequence is a list of segments: texts, images that the ViT sees, and latents of images. Processor, collator, pipeline
and session all read conversations here, and nothing else writes a special token or a label.
Source: original behaviour, points 1-3, 8, 14-16, 31 and 33.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .errors import shown
from .image_processing_bagel import open_image, to_rgb


if TYPE_CHECKING:
    from .processing_bagel import BagelProcessor

# Tokens of BAGEL by the name that the configuration gives to their ids.
SPECIAL_TOKENS = {
    "bos_token_id": "<|im_start|>",
    "eos_token_id": "<|im_end|>",
    "pad_token_id": "<|endoftext|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "latent_token_id": "<|vision_pad|>",
}
START, END = SPECIAL_TOKENS["bos_token_id"], SPECIAL_TOKENS["eos_token_id"]
END_OF_TEXT = SPECIAL_TOKENS["pad_token_id"]
VISION_START, VISION_END = SPECIAL_TOKENS["vision_start_token_id"], SPECIAL_TOKENS["vision_end_token_id"]
IMAGE_PLACEHOLDER, LATENT_PLACEHOLDER = SPECIAL_TOKENS["image_token_id"], SPECIAL_TOKENS["latent_token_id"]

# Values of `mm_token_type_ids`. The library reserves 1 for images, 2 for videos and 3 for audio.
TEXT_TOKEN, IMAGE_TOKEN, LATENT_TOKEN = 0, 1, 4

# Label of a token that nothing has to predict.
IGNORED_LABEL = -100

# System segments of thinking (point 14), with a space before the newline as in training.
UNDERSTANDING_THINK_PROMPT = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> "
    "answer here"
)
GENERATION_THINK_PROMPT = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> "
    "image here"
)
THINK_PROMPTS = {"text": UNDERSTANDING_THINK_PROMPT, "image": GENERATION_THINK_PROMPT}

ROLES = ("system", "developer", "user", "assistant", "tool")
# Names that the libraries and OpenAI's two interfaces give to the parts of a message.
TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_TYPES = ("image", "image_url", "input_image")
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
SEGMENT_TYPES = ("text", "vit_image", "vae_image")
# Behind which parts of an answer it is learned what follows, see [`sample_segments`].
NEXT_ACTIONS = ("text", "all", "none")


# `chat_segments` as a template. A segment has no role and no newline (points 1-3); what the assistant says is marked as
# generated.
CHAT_TEMPLATE = (
    f"{{%- set start, end = '{START}', '{END}' -%}}"
    f"{{%- set vit = '{VISION_START}{IMAGE_PLACEHOLDER}{VISION_END}' -%}}"
    f"{{%- set vae = '{VISION_START}{LATENT_PLACEHOLDER}{VISION_END}' -%}}"
    "{%- set draws = generation_mode is defined and generation_mode == 'image' -%}"
    "{%- if think is defined and think -%}"
    f"{{{{- start + ({GENERATION_THINK_PROMPT!r} if draws else {UNDERSTANDING_THINK_PROMPT!r}) + end -}}}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set content = message['content'] or [] -%}"
    "{%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}"
    "{%- for part in content -%}"
    f"{{%- if part['type'] in {TEXT_TYPES} and message['role'] == 'assistant' -%}}"
    "{{- start -}}{%- generation -%}{{- part['text'] + end -}}{%- endgeneration -%}"
    f"{{%- elif part['type'] in {TEXT_TYPES} -%}}{{{{- start + part['text'] + end -}}}}"
    f"{{%- elif part['type'] not in {IMAGE_TYPES} -%}}"
    "{{- raise_exception('a part must be a text or an image, got ' ~ part['type']) -}}"
    "{%- elif draws -%}{{- vae + vit -}}"
    "{%- else -%}{{- vit -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- start -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Segment:
    """A part of a sequence.

    Attributes:
        type (`str`): `"text"`, `"vit_image"` (seen) or `"vae_image"` (latents).
        content (`Any`): The text, or the image as [`~image_processing_bagel.to_rgb`] takes it.
        loss (`bool`): Whether it is learned: a text token by token, latents from noise. Otherwise it is a condition.
        dropout (`bool`): Whether it may be dropped, so that the model learns to draw without it, as guidance needs.
        then (`str`, *optional*): What its last token learns to predict: the `"next"` segment, or the `"end"` of the answer.
        sanitize_control_tokens (`bool`): Whether special tokens in a text are words like others.
    """

    type: str
    content: Any
    loss: bool = False
    dropout: bool = False
    then: str | None = None
    sanitize_control_tokens: bool = False


@dataclass(frozen=True)
class EncodedSegment:
    """A segment as tokens, on the CPU.

    Attributes:
        segment (`Segment`): What was encoded.
        token_ids (`torch.LongTensor` of shape `(tokens,)`): Its two markers included; of an image, placeholders.
        grid (`tuple[int, int]`, *optional*): Rows and columns of the tokens of an image.
        pixels (`torch.FloatTensor`, *optional*):
            Of an image that is seen its patches `(patches, patch_dim)`, of latents the pixels `(3, height, width)` that
            the VAE encodes.
        latents (`torch.FloatTensor` of shape `(tokens, latent_dim)`, *optional*): What the VAE made of the pixels.
    """

    segment: Segment
    token_ids: torch.Tensor
    grid: tuple[int, int] | None = None
    pixels: torch.Tensor | None = None
    latents: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_positions(self) -> int:
        """Rope positions that it takes: one for each token of a text, one for an image (point 2)."""
        return len(self) if self.segment.type == "text" else 1

    @property
    def token_types(self) -> torch.Tensor:
        """Text, image or latent, `(tokens,)`; the markers of an image are text."""
        kind = {"text": TEXT_TOKEN, "vit_image": IMAGE_TOKEN, "vae_image": LATENT_TOKEN}[self.segment.type]
        types = torch.full_like(self.token_ids, kind)
        types[[0, -1]] = TEXT_TOKEN
        return types

    @property
    def labels(self) -> torch.Tensor:
        """Where a token is to be predicted from those before it, its id, else -100 (point 31), `(tokens,)`."""
        labels = torch.full_like(self.token_ids, IGNORED_LABEL)
        if self.segment.type == "text" and self.segment.loss:
            labels[1:] = self.token_ids[1:]
        return labels


def encode_segments(
    processor: BagelProcessor, segments: Sequence[Segment], **image_settings: Any
) -> list[EncodedSegment]:
    """
    Segments as tokens, on the CPU. An image that fills several segments is preprocessed once.

    Args:
        processor ([`BagelProcessor`]): Whose tokenizer and image processor are used.
        segments (`Sequence[Segment]`)
        image_settings: Settings of [`BagelImageProcessor`] for these images.

    Raises:
        ValueError: if a text holds a placeholder of images.
        TypeError, ValueError, OSError: if an image cannot be read.
    """
    features: dict[int, Any] = {}
    encoded = []
    for segment in segments:
        if segment.type == "text":
            encoded.append(_encode_text(processor, segment))
            continue
        key = id(segment.content)
        if key not in features:
            features[key] = processor.image_processor(
                read_image(segment.content),
                return_vae_pixel_values=True,
                return_image_grid_thw=False,
                return_tensors="pt",
                **image_settings,
            )
        encoded.append(_encode_image(processor, segment, features[key]))
    return encoded


def read_image(source: Any) -> Image.Image:
    """A new RGB image from what [`~image_processing_bagel.to_rgb`] takes, or from what `datasets` did not decode."""
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else open_image(source["bytes"])
    return to_rgb(source)


def _encode_text(processor: BagelProcessor, segment: Segment) -> EncodedSegment:
    text = segment.content
    _check_unicode(text)
    if segment.sanitize_control_tokens:
        words = processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        start, end = processor.tokenizer.convert_tokens_to_ids([START, END])
        return EncodedSegment(segment, torch.tensor([start, *words, end]))
    if IMAGE_PLACEHOLDER in text or LATENT_PLACEHOLDER in text:
        raise ValueError(
            f"A text holds {IMAGE_PLACEHOLDER} or {LATENT_PLACEHOLDER}, which stand for images: {shown(text)}."
        )
    return EncodedSegment(segment, torch.tensor(processor.tokenizer(f"{START}{text}{END}")["input_ids"]))


def _encode_image(processor: BagelProcessor, segment: Segment, features: Mapping[str, Any]) -> EncodedSegment:
    if segment.type == "vit_image":
        rows, columns = features["image_grid_hw"][0].tolist()
        pixels, placeholder = features["pixel_values"], IMAGE_PLACEHOLDER
    else:
        pixels, placeholder = features["vae_pixel_values"][0], LATENT_PLACEHOLDER
        rows, columns = (side // processor.image_processor.vae_stride for side in pixels.shape[1:])
    ids = processor.tokenizer.convert_tokens_to_ids([VISION_START, placeholder, VISION_END])
    token_ids = torch.tensor([ids[0], *[ids[1]] * (rows * columns), ids[2]])
    return EncodedSegment(segment, token_ids, (rows, columns), pixels)


def content_parts(message: Mapping[str, Any]) -> list[Any]:
    """
    The parts of a message's content, by the names that transformers gives them: `{"type": "text", "text": ...}`, and
    `{"type": "image", "image": ...}` or `{"type": "image"}`. A string is one text; empty content has no parts.
    """
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else [_named_part(part) for part in content]


def _named_part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in TEXT_TYPES:
        return {**part, "type": "text"}
    if kind not in IMAGE_TYPES:
        return part
    given = {key: value for key, value in part.items() if key in IMAGE_KEYS and value is not None}
    if len(given) > 1:
        return part
    rest = {key: value for key, value in part.items() if key not in IMAGE_KEYS}
    images = [image["url"] if isinstance(image, Mapping) and "url" in image else image for image in given.values()]
    return {**rest, "type": "image"} | ({"image": images[0]} if images else {})


def chat_segments(
    messages: Sequence[Mapping[str, Any]], think: bool = False, generation_mode: str = "text"
) -> list[Segment]:
    """
    Segments of a conversation that the model is to continue.

    Args:
        messages (`Sequence[Mapping]`): One conversation, see [`check_conversation`].
        think (`bool`, *optional*, defaults to `False`): Whether a system segment asks for thoughts first (point 14).
        generation_mode (`str`, *optional*, defaults to `"text"`):
            `"text"` to answer; `"image"` to draw, which gives every image as latents and as ViT tokens (point 3).
    """
    segments = [Segment("text", THINK_PROMPTS[generation_mode])] if think else []
    for part in (part for message in messages for part in content_parts(message)):
        if part["type"] == "text":
            segments.append(Segment("text", part["text"]))
            continue
        image = part["image"]
        if generation_mode == "image":
            segments.append(Segment("vae_image", image))
        segments.append(Segment("vit_image", image))
    return segments


def without_last_text(segments: Sequence[EncodedSegment]) -> list[EncodedSegment]:
    """What guidance compares the last text with: everything before it, or all if an image is last (point 16)."""
    ends_in_text = bool(segments) and segments[-1].segment.type == "text"
    return list(segments[:-1] if ends_in_text else segments)


def without_images(segments: Sequence[EncodedSegment]) -> list[EncodedSegment]:
    """What guidance compares the images with: all texts (point 16)."""
    return [segment for segment in segments if segment.segment.type == "text"]


def check_conversation(conversation: Any, name: str = "conversation", placeholders: bool = False) -> None:
    """
    Refuse what is no conversation.

    Args:
        conversation (`Any`): Messages, or a list of lists of messages.
        name (`str`, *optional*, defaults to `"conversation"`): What errors call it.
        placeholders (`bool`, *optional*, defaults to `False`): Whether image parts may leave out the image.

    Raises:
        TypeError: if it is not a list of messages, or a list of such lists.
        ValueError: if it is empty, or if a message has no content, or an unknown role or part.
    """
    if not isinstance(conversation, (list, tuple)):
        raise TypeError(f"`{name}` must be a list of messages, got a `{type(conversation).__name__}`.")
    is_nested = len(conversation) > 0 and all(isinstance(item, (list, tuple)) for item in conversation)
    for messages in conversation if is_nested else [conversation]:
        if not messages:
            raise ValueError(f"`{name}` is empty, or holds an empty conversation: pass at least one message.")
        for message in messages:
            _check_message(message, name, placeholders)


def _check_message(message: Any, name: str, placeholders: bool) -> None:
    is_message = isinstance(message, Mapping) and ("content" in message or bool(message.get("tool_calls")))
    if not is_message or not isinstance(message.get("content"), (str, list, tuple, type(None))):
        raise ValueError(f"`{name}` holds a message without content: {shown(message)}. Pass `role` and `content`.")
    if message.get("role") not in ROLES:
        raise ValueError(
            f"`{name}` holds the unknown role {shown(message.get('role'))}; known are {', '.join(ROLES)}."
        )
    for part in content_parts(message):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            _check_unicode(part["text"])
            continue
        given = [part[key] for key in IMAGE_KEYS if key in part] if kind == "image" else []
        if kind == "image" and not given and not placeholders:
            raise ValueError(
                f"`{name}` holds an image part without its image: {shown(part)}. Pass {{'type': 'image', 'image': ...}}."
            )
        if kind != "image" or len(given) > 1 or any(isinstance(image, (list, tuple)) for image in given):
            raise ValueError(
                f"`{name}` holds a part that is neither {{'type': 'text', 'text': ...}} nor {{'type': 'image', "
                f"'image': ...}}: {shown(part)}."
            )


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"A text holds half a character, which is no Unicode ({error}): {shown(text)}.") from error


def sample_segments(sample: Mapping[str, Any], next_action: str = "text") -> list[Segment]:
    """
    Segments of a training sample.

    Args:
        sample (`Mapping`):
            Either `{"messages": [...]}`, a conversation in chat format, or `{"segments": [...]}`, the same spelled out
            as `{"type": "text" | "vit_image" | "vae_image", "text" | "image": ..., "loss": bool, "dropout": bool}`.

            In a conversation the assistant's texts and images are learned and all else conditions. An assistant's
            image that is followed by anything is given back clean. If the assistant draws, every condition is given
            as latents and as ViT tokens; else the ViT tokens suffice. Image parts may leave out the image: a column
            `images` then holds them in order. A part may override what follows from its place: `loss`, `dropout`, and
            for an image `vae` and `vit`, whether it conditions as latents and as ViT tokens; `next_action`, whether its
            last token learns what follows: a text, a picture, or the end of the answer.
        next_action (`str`, *optional*, defaults to `"text"`):
            Where that is learned in conversations: behind each `"text"` of an answer that has pictures, too, as
            Bagel-Zebra-CoT and BAGEL-Canvas learn it; behind `"all"` parts of every answer and before its first one, so that
            the model also decides what it begins with (a picture that ends a sample is not given back, so that nothing is
            learned behind it unless it has `next_action`); or nowhere (`"none"`), as BAGEL itself.

    Raises:
        TypeError, ValueError: if the sample is malformed, or has no target.
    """
    if not isinstance(sample, Mapping):
        raise TypeError(f"A sample must be a dict with `messages` or `segments`, got a `{type(sample).__name__}`.")
    given = [name for name in ("messages", "segments") if sample.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"A sample must have either `messages` or `segments`, got the keys {sorted(sample)}.")
    if given == ["messages"]:
        segments = _from_messages(sample, next_action)
    else:
        segments = _from_spelled_out(sample["segments"])
    if not any(segment.loss or segment.then for segment in segments):
        raise ValueError(
            "The sample has no target: no text or image of the assistant, and no part with `loss`. There is nothing "
            "to learn from it."
        )
    # What conditions a drawing may be dropped: guidance compares drawings with and without it.
    drawings = [index for index, segment in enumerate(segments) if segment.type == "vae_image" and segment.loss]
    return [
        replace(segment, dropout=not segment.loss and _choice(segment.dropout, index < max(drawings, default=-1)))
        for index, segment in enumerate(segments)
    ]


def _from_spelled_out(parts: Any) -> list[Segment]:
    if not isinstance(parts, Sequence) or isinstance(parts, str) or not parts:
        raise TypeError(f"`segments` must be a list of dicts, got {shown(parts)}.")
    segments: list[Segment] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in SEGMENT_TYPES:
            raise ValueError(f"`segments` holds {shown(part)}; its `type` must be one of {', '.join(SEGMENT_TYPES)}.")
        key = "text" if kind == "text" else "image"
        content = part.get(key)
        if content is None or (kind == "text" and not isinstance(content, str)):
            raise ValueError(f"`segments` holds a {kind} without its {key}: {shown(part)}.")
        if kind == "vit_image" and part.get("loss"):
            raise ValueError("`segments` holds a vit_image with `loss`: only texts and latents are learned.")
        if part.get("next_action") and kind == "vae_image" and part.get("loss"):
            raise ValueError("`segments` holds noised latents with `next_action`: nothing behind them sees them.")
        then = None if not part.get("next_action") else "next" if len(segments) + 1 < len(parts) else "end"
        segments.append(Segment(kind, content, bool(part.get("loss")), part.get("dropout"), then))
    return segments


def _from_messages(sample: Mapping[str, Any], next_action: str) -> list[Segment]:
    messages = _with_images(sample["messages"], sample.get("images"))
    check_conversation(messages, "messages")
    if not all(isinstance(message, Mapping) for message in messages):
        raise TypeError("`messages` of a sample must be one conversation, a list of messages, got a list of lists.")
    said = [(message["role"] == "assistant", part) for message in messages for part in content_parts(message)]
    parts = [(part, _choice(part.get("loss"), is_answer)) for is_answer, part in said]
    draws = any(loss and part["type"] != "text" for part, loss in parts)
    thens = _what_follows([(is_answer, *part) for (is_answer, _), part in zip(said, parts, strict=True)], next_action)
    segments: list[Segment] = []
    for index, ((part, loss), then) in enumerate(zip(parts, thens, strict=True)):
        dropout = part.get("dropout")
        if part["type"] == "text":
            segments.append(Segment("text", part["text"], loss, dropout, then))
            continue
        image, start = part["image"], len(segments) + loss
        if loss:
            segments.append(Segment("vae_image", image, loss, dropout))
            if index == len(parts) - 1 and not part.get("next_action"):
                continue
        if _choice(part.get("vae"), draws):
            segments.append(Segment("vae_image", image, False, dropout))
        if _choice(part.get("vit"), True):
            segments.append(Segment("vit_image", image, False, dropout))
        if then is not None and len(segments) > start:
            # The last thing that is seen of an image is what predicts what follows it.
            segments[-1] = replace(segments[-1], then=then)
    return segments


def _what_follows(parts: Sequence[tuple[bool, Any, bool]], next_action: str) -> list[str | None]:
    """`then` of each part, from whether the assistant says it, the part, and whether it is learned."""
    thens: list[str | None] = []
    for is_answer, turn in itertools.groupby(parts, key=lambda part: part[0]):
        own = list(turn)
        is_followed = len(thens) + len(own) < len(parts) and not is_answer
        has_both = {part["type"] == "text" for _, part, loss in own if is_answer and loss} == {True, False}
        for index, (_, part, loss) in enumerate(own):
            is_last = index + 1 == len(own)
            is_decided = {
                "none": False,
                "text": has_both and loss and part["type"] == "text",
                "all": is_answer or (is_last and is_followed),
            }[next_action]
            then = "end" if is_last and not is_followed else "next"
            thens.append(then if _choice(part.get("next_action"), is_decided) else None)
    return thens


def _with_images(messages: Any, images: Any) -> Any:
    """Messages whose empty image parts got the images of the sample's own column."""
    if images is None or not isinstance(messages, Sequence):
        return messages
    rest = list(images) if isinstance(images, (list, tuple)) else [images]
    count = len(rest)
    filled = []
    for message in messages:
        if isinstance(message, Mapping) and isinstance(message.get("content"), (str, list, tuple)):
            parts = [dict(part) if isinstance(part, Mapping) else part for part in content_parts(message)]
            for part in parts:
                if isinstance(part, dict) and part.get("type") == "image" and part.keys().isdisjoint(IMAGE_KEYS):
                    if not rest:
                        raise ValueError(f"`images` holds {count} images, fewer than `messages` refer to.")
                    part["image"] = rest.pop(0)
            message = {**message, "content": parts}
        filled.append(message)
    if rest:
        raise ValueError(f"`images` holds {count} images, {len(rest)} more than `messages` refer to.")
    return filled


def _choice(value: Any, default: bool) -> bool:
    """An override, if a part has one; tables store an absent one as `None`."""
    return default if value is None else bool(value)


__all__ = [
    "CHAT_TEMPLATE",
    "SPECIAL_TOKENS",
    "EncodedSegment",
    "Segment",
    "chat_segments",
    "sample_segments",
]
