# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""How fine-tunes of BAGEL answer in texts and pictures in turn: each was trained with a loop of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from transformers_bagel.checkpoints import read_json
from transformers_bagel.fine_tunes import fine_tune_of

from .conversation import IMAGE, TEXT, Update


logger = logging.get_logger(__name__)

ENCODERS = ("vae", "vit")


@dataclass(frozen=True)
class InterleaveProtocol:
    """
    How a model answers in texts and pictures in turn.

    Args:
        name (`str`): By which [`PROTOCOLS`] knows it.
        trigger (`str` or `tuple[str, ...]`, *optional*, defaults to `"token"`):
            What a text is followed by a picture for: `"token"`, the token that the model predicts behind it; `"always"`;
            or what it holds, a regular expression or several, of which the first counts that is found.
        stop (`str`, *optional*): A regular expression; a text that holds it is the last.
        begins_with (`str`, *optional*, defaults to `"text"`):
            What an answer begins with, if it is left to the model: a `"text"`, or what the `"token"` behind the user's says.
        after_image (`str`, *optional*, defaults to `"text"`):
            What follows a picture: a `"text"`, or what the `"token"` behind it says, which may also be another picture or
            the end.
        goes_on (`bool`, *optional*, defaults to `False`):
            Whether another text follows one that neither triggers a picture nor stops. If a token decides: whether one does
            that is neither the start of a text, nor that of a picture, nor the end.
        keeps_idle_texts (`bool`, *optional*, defaults to `True`): Whether such a text goes into the contexts.
        max_texts, max_images, max_items (`int`, *optional*): After how many of them an answer ends.
        takes_images (`bool`, *optional*, defaults to `True`): Whether the user may show images.
        given_text, given_image, written, drawn ([`Update`]): What each does to the contexts of guidance.
        text_sees (`tuple[str, ...]`, *optional*): By which encoders a text sees the images, `"vae"`, `"vit"` or both.
        drawn_as (`tuple[str, ...]`, *optional*): By which encoders a picture is read back.
        resizes_drawn (`bool`, *optional*, defaults to `True`): Whether the ViT sees a picture as the VAE does, resized.
        size (`str`, *optional*): A picture is as large as the `"last"` image, or as the last one `"given"`.
        default_size (`tuple[int, int]`, *optional*): Height and width without any image, by default the model's.
        clean (`Callable[[str], str]`, *optional*): What is kept of a text that was written.
        clean_last (`Callable[[str], str]`, *optional*): What is given out of the text that stops, after that.
        drops_cut_tokens (`int`, *optional*, defaults to 0): Tokens that a text which was cut off loses at its end.
        system_prompt (`str`, *optional*): The first segment of each conversation.
        think_prompt (`str`, *optional*): The same, if the caller asks the model to think.
        reflection (`str`, *optional*): What is said behind each picture.
        closing_picture (`bool`, *optional*, defaults to `False`):
            Whether the last text is followed by one more picture, which is drawn from the given texts and all pictures.
        finish (`Callable`, *optional*): Makes the picture of its decoded values and of the text that asked for it.
        settings (`dict`, *optional*): Settings of drawing and writing, in the pipeline's names.
    """

    name: str
    trigger: str | tuple[str, ...] = "token"
    stop: str | None = None
    begins_with: str = "text"
    after_image: str = "text"
    goes_on: bool = False
    keeps_idle_texts: bool = True
    max_texts: int | None = None
    max_images: int | None = None
    max_items: int | None = None
    takes_images: bool = True
    given_text: Update = TEXT
    given_image: Update = IMAGE
    written: Update = TEXT
    drawn: Update = IMAGE
    text_sees: tuple[str, ...] = ("vit",)
    drawn_as: tuple[str, ...] = ENCODERS
    resizes_drawn: bool = True
    size: str = "last"
    default_size: tuple[int, int] | None = None
    clean: Callable[[str], str] | None = None
    clean_last: Callable[[str], str] | None = None
    drops_cut_tokens: int = 0
    system_prompt: str | None = None
    think_prompt: str | None = None
    reflection: str | None = None
    closing_picture: bool = False
    finish: Callable[[np.ndarray, str], Image.Image] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def tag(self, text: str) -> re.Match | None:
        """What in a text triggers a picture, if it is something in the text."""
        patterns = (self.trigger,) if isinstance(self.trigger, str) else self.trigger
        return next(filter(None, (re.search(pattern, text, re.DOTALL) for pattern in patterns)), None)

    def asks_for_picture(self, text: str) -> bool:
        """Whether a text triggers a picture, if it is not a token that does."""
        return self.trigger == "always" or self.tag(text) is not None

    def stops(self, text: str) -> bool:
        return self.stop is not None and bool(re.search(self.stop, text, re.DOTALL))

    def untagged(self, text: str) -> str:
        """A text without what triggered its picture."""
        match = self.tag(text)
        return text if match is None else text[: match.start()] + text[match.end() :]

    def with_changes(self, **changes: Any) -> InterleaveProtocol:
        return replace(self, **changes)


def inside_think(text: str) -> str:
    """What stands between `<think>` and `</think>`, or all of it."""
    match = re.search(r"<think>(.*?)</think>", text.strip(), re.DOTALL)
    return (match[1] if match else text).strip()


def without_marks(text: str) -> str:
    """A text without tags and references to images."""
    return " ".join(re.sub(r"<[^<>]*>", " ", text).split())


# ColorBrewer's scheme "Spectral" of eleven colours, which matplotlib interpolates in 256 steps.
_SPECTRAL = (
    *((158, 1, 66), (213, 62, 79), (244, 109, 67), (253, 174, 97), (254, 224, 139), (255, 255, 191)),
    *((230, 245, 152), (171, 221, 164), (102, 194, 165), (50, 136, 189), (94, 79, 162)),
)


def depth_or_segments(values: np.ndarray, text: str) -> Image.Image:
    """A picture of COOPER: depth is the mean of the channels, in the colours of a colour map."""
    if not re.search(r"<depth-estimation>.*?</depth-estimation>", text, re.DOTALL):
        return truncated(values, text)
    places = (values.mean(-1) * 256).astype(int).clip(0, 255) / 255
    colours = [
        np.interp(places, np.linspace(0, 1, len(_SPECTRAL)), channel) for channel in zip(*_SPECTRAL, strict=True)
    ]
    return Image.fromarray(np.stack(colours, axis=-1).astype(np.uint8))


def truncated(values: np.ndarray, text: str) -> Image.Image:
    """Values in [0, 1] as bytes, cut off instead of rounded, as the original code makes them."""
    return Image.fromarray((values * 255).astype(np.uint8))


# What a text with a picture's tag, or an answer, looks like in the fine-tunes, and how their own loops set them. The prompts
# are those that they were trained or are run with.
_ZEBRA = InterleaveProtocol(
    "zebra",
    trigger="always",
    stop=r"Final Answer:|<answer>",
    finish=truncated,
    system_prompt=(
        "You are an AI reasoning assistant capable of step-by-step interleaved text and visual chain of thought. Think step "
        "by step and use visual aids to enhance your problem-solving. Provide your final conclusion clearly in the format "
        'of "Final Answer: <answer here>"'
    ),
    settings={"guidance_scale": 4.0, "image_guidance_scale": 2.0, "cfg_interval": (0.0, 1.0)}
    | {"cfg_renorm_type": "text_channel", "max_new_tokens": 999, "do_sample": True},
)
_SOT = _ZEBRA.with_changes(
    name="sot",
    stop=r"(?i:<assembly>|final assembly:)",
    clean=inside_think,
    takes_images=False,
    clean_last=without_marks,
    closing_picture=True,
    system_prompt=(
        "You are an AI assistant specialized in shape understanding and 3D object construction. Think step by step through "
        "the process of building 3D objects from textual descriptions. Generate visual aids at each construction step to "
        "show the progressive assembly of the object. Wrap your reasoning with <think></think> tokens, and wrap your final "
        "assembly confirmation with <assembly></assembly> tokens. Provide your final conclusion clearly in the format of "
        "'<assembly>Final Assembly: <answer here></assembly>"
    ),
)
_CANVAS = InterleaveProtocol(
    "canvas",
    trigger="token",
    goes_on=True,
    max_items=10,
    given_text=Update("keep", "read"),
    given_image=Update("read", "keep"),
    written=Update("keep", "read"),
    drawn=Update("read", "keep"),
    text_sees=ENCODERS,
    size="given",
    default_size=(512, 512),
    clean=str.strip,
    drops_cut_tokens=2,
    finish=truncated,
    settings={"guidance_scale": 4.0, "image_guidance_scale": 2.0, "cfg_interval": (0.0, 1.0)}
    | {"cfg_renorm_type": "text_channel", "max_new_tokens": 2047, "do_sample": True},
)
_THINKMORPH = InterleaveProtocol(
    "thinkmorph",
    trigger=r"<image_start>",
    max_images=3,
    written=Update(),
    drawn=Update(),
    text_sees=ENCODERS,
    size="given",
    finish=truncated,
    think_prompt=(
        "\nLet's think step by step to answer the question. For text-based thinking, enclose the process within <think> "
        "</think>, e.g. <think> thinking process here </think>. For visual thinking, enclose the content within "
        "<image_start> </image_end>, e.g. <image_start> thinking image here </image_end>. Finally conclude with the final "
        "answer wrapped in <answer></answer> tags, i.e.<answer> answer here </answer>.\n"
    ),
    settings={"guidance_scale": 4.0, "image_guidance_scale": 2.0, "cfg_interval": (0.0, 1.0)}
    | {"cfg_renorm_type": "text_channel", "max_new_tokens": 4095, "do_sample": True, "think": True},
)
_TWIFF = InterleaveProtocol(
    "twiff",
    trigger="always",
    stop=r"</?ans>",
    max_images=5,
    written=Update("keep", "read"),
    drawn=Update("after", "before"),
    text_sees=ENCODERS,
    resizes_drawn=False,
    size="given",
    default_size=(512, 512),
    finish=truncated,
    system_prompt=(
        "You are an AI assistant capable of reasoning with visual imagery. You should conduct a detailed analysis of the "
        "question. Consider different angles, potential solutions, and reason through the problem step-by-step with image. "
        "After fully reasoning through the problem\u2014potentially using image-based thinking\u2014provide only a clear, "
        "concise, and direct answer to the user's question."
    ),
    settings={"guidance_scale": 3.5, "image_guidance_scale": 2.0, "cfg_interval": (0.0, 1.0)}
    | {"cfg_renorm_type": "channel", "max_new_tokens": 999, "do_sample": True},
)
_COOPER = InterleaveProtocol(
    "cooper",
    trigger=(r"<depth-estimation>.*?</depth-estimation>", r"<segmentation>.*?</segmentation>"),
    stop=r"<answer>.*?</answer>",
    goes_on=True,
    keeps_idle_texts=False,
    max_texts=3,
    written=Update("untagged", "read"),
    drawn=Update("after", "read"),
    text_sees=ENCODERS,
    drawn_as=("vit",),
    size="given",
    finish=depth_or_segments,
    reflection=(
        "\nHere is the result of the depth-estimation/segmentation. Please note that the result of the "
        "depth-estimation/segmentation is not always accurate. Please check it carefully. \nNow please continue to think in "
        "<think>...</think> and then decide whether to continue to generate the depth-estimation/segmentation in "
        "<depth-estimation>...</depth-estimation>/<segmentation>...</segmentation> or give the answer in "
        "<answer>...</answer>.\n"
    ),
    system_prompt=(
        "You are a specialized multimodal assistant. Your purpose is to solve visual question answering tasks by thinking "
        "step-by-step with your skill of depth estimation and semantic segmentation.\n\n# Skills\n\nYou can prompt yourself "
        "to generate depth-estimation/segmentation by <depth-estimation>...</depth-estimation> / "
        "<segmentation>...</segmentation> as follows:\n\n<depth-estimation>Estimate the depth of the image and generate the "
        "depth map.</depth-estimation>\nOR\n<segmentation>Segment the objects in the image with different "
        "colors.</segmentation>\n\n# Instruction\n\n1. In each turn, you should start with <think> tag. In this tag, you need "
        "to conduct a step-by-step reasoning process about the image and question and evaluate whether tool use would be "
        "helpful and give the reason. If received generated results, you also need to analyze them.\n2. Please note that the "
        "result of the generated depth-estimation/segmentation are not always accurate. Please carefully check whether they "
        "are helpful for answering questions or whether they are accurate.\n3. If you think depth-estimation/segmentation is "
        "useful, call to generate them by <depth-estimation>...</depth-estimation> / <segmentation>...</segmentation>. \n4. "
        "If you think no more to generate, you can answer in <answer> tag. You need to provide a concise summary of your "
        "reasoning process that leads to the final answer. Besides, you also need to put a simple and direct answer in "
        "\\boxed{{}} for verification.\n5. Try to use the tools as much as possible.\n\nThe structure of your response should "
        "be like this:\n<think> ... </think>\n<depth-estimation> ... </depth-estimation> / <segmentation> ... "
        "</segmentation>\n\nOR\n\n<think> ... </think>\n<answer> ... </answer>\n"
    ),
    settings={"guidance_scale": 4.0, "image_guidance_scale": 2.0, "cfg_interval": (0.0, 1.0)}
    | {"cfg_renorm_type": "text_channel", "max_new_tokens": 4095, "do_sample": False},
)
# Decides by the token behind each part, the user's included.
_PLAIN = InterleaveProtocol("plain", max_items=10, begins_with="token", after_image="token")
PROTOCOLS = {protocol.name: protocol for protocol in (_PLAIN, _THINKMORPH, _ZEBRA, _SOT, _CANVAS, _TWIFF, _COOPER)}


def protocol_of(pipe: Any) -> InterleaveProtocol:
    """The protocol of the fine-tune that a pipeline's model is named after, which is said; else the plain one."""
    model = pipe.transformer
    names = [name for name in (model.name_or_path, model.config.name_or_path, pipe.name_or_path) if name]
    # A conversion says in its configuration what it was made of.
    files = [os.path.join(name, "config.json") for name in names]
    stated = [read_json(file).get("_name_or_path") for file in files if os.path.isfile(file)]
    for name in (*names, *(name for name in stated if isinstance(name, str))):
        known = fine_tune_of(name)
        if known is not None and known.protocol is not None:
            logger.warning(
                f"'{name}' is a fine-tune that answers in texts and pictures by a loop of its own: "
                f'`protocol="{known.protocol}"` is chosen. Pass another one, such as `protocol="plain"`, to choose otherwise.'
            )
            return PROTOCOLS[known.protocol]
    return _PLAIN
