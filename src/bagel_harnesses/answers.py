# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a model answers to the questions of a harness, in batches: words, drawings, edits, or words and pictures in turn."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffusers_bagel import BagelPipeline, BagelSession, send_all
from diffusers_bagel.inputs import check_choice, check_flag, check_whole_number
from diffusers_bagel.presets import find_preset
from transformers_bagel import BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.errors import shown


OUTPUTS = ("text", "image", "interleaved", "auto")
MAX_NEW_TOKENS = 1024
_SAMPLING = {"do_sample", "temperature", "top_p", "top_k"}
_WRITING = _SAMPLING | {"max_new_tokens", "min_new_tokens", "num_beams", "repetition_penalty", "no_repeat_ngram_size"}
# Of the pipeline's call, what is no setting: the questions, and what the answers are made into.
_NO_SETTINGS = {
    *("self", "prompt", "image", "messages", "think", "generator", "latents", "num_images_per_prompt", "output_type"),
    *("return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
}
_DRAWING = inspect.signature(BagelPipeline.__call__).parameters.keys() - _NO_SETTINGS
# Of an answer that takes as many texts and pictures as it likes, the length of a plan is that of its texts.
_IN_TURN = _DRAWING - {"max_think_tokens"} | {
    "max_new_tokens",
    "max_images",
    "sanitize_control_tokens",
    "stop_strings",
}
SETTINGS = {"text": _WRITING | {"preset"}, "image": _DRAWING, "interleaved": _IN_TURN, "auto": _IN_TURN}


@dataclass(frozen=True)
class Answer:
    """
    What a model said and drew.

    Attributes:
        text (`str`): The words, less the thoughts; of a drawing, its plan.
        content (`list[dict]`): Texts and pictures in order, as parts of a message.
    """

    text: str
    content: list[dict[str, Any]]

    @property
    def images(self) -> list[Image.Image]:
        """All pictures."""
        return [part["image"] for part in self.content if part["type"] == "image"]

    def saved(self, folder: str | Path, name: str) -> dict[str, Any]:
        """
        The answer with its pictures as files: `{"text": ..., "images": [files], "content": [parts]}`.

        Args:
            folder (`str` or `Path`): Where the pictures go; it is made.
            name (`str`): How their names begin.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths: list[str] = []
        content = []
        for part in self.content:
            if part["type"] == "image":
                paths.append(str(Path(folder, f"{name}_{len(paths)}.png")))
                part["image"].save(paths[-1])
                part = {"type": "image", "path": paths[-1]}
            content.append(part)
        return {"text": self.text, "images": paths, "content": content}


class Answerer:
    """
    A model that answers what harnesses ask.

    Args:
        pretrained (`str`): Hub id or folder.
        output (`str`, *optional*, defaults to `"text"`):
            What it answers with: `"text"`, `"image"` for drawings and edits, `"interleaved"` for both in turn, or
            `"auto"`, by which the model decides.
        think (`bool`, *optional*): Whether it thinks first. By default it does not, unless other settings say so.
        seed (`int`, *optional*, defaults to 0): Of the first question; that of another follows from its number.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): Of the weights.
        device (`str`, *optional*): By default the GPU, if there is one.
        settings:
            Of `generate()`, of the pipeline's call or of a session, whichever answers. They go before what a task asks for.

    Raises:
        TypeError, ValueError: for what cannot work, before anything is loaded.
    """

    def __init__(
        self,
        pretrained: str,
        output: str = "text",
        think: bool | None = None,
        seed: int = 0,
        dtype: str = "bfloat16",
        device: str | None = None,
        **settings: Any,
    ):
        check_choice("output", output, OUTPUTS)
        check_flag("think", think or False)
        check_whole_number("seed", seed, 0)
        if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ValueError(f'`dtype` must be the name of one of torch, such as "bfloat16", got {shown(dtype)}.')
        self.output, self.think, self.seed = output, think, seed
        if unknown := settings.keys() - SETTINGS[output]:
            raise TypeError(
                f'{", ".join(sorted(unknown))}: no setting of answers by `output="{output}"`. '
                f"Known are {', '.join(sorted(SETTINGS[output]))}."
            )
        if "preset" in settings and find_preset(settings["preset"]).output not in (output, *OUTPUTS[2:]):
            raise ValueError(f'`preset` {shown(settings["preset"])} is not for answers by `output="{output}"`.')
        self.settings = settings
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if output == "text":
            # Half of the weights are for drawing, and stay on the disk.
            self.pipe = BagelPipeline(
                transformer=BagelForConditionalGeneration.from_pretrained(
                    pretrained, dtype=getattr(torch, dtype), visual_gen=False
                ).to(device),
                vae=None,
                scheduler=FlowMatchEulerDiscreteScheduler(),
                processor=BagelProcessor.from_pretrained(pretrained),
            )
        else:
            self.pipe = BagelPipeline.from_pretrained(pretrained, dtype=getattr(torch, dtype)).to(device)
        self.pipe.set_progress_bar_config(disable=True)

    def seed_of(self, number: Any) -> int:
        """The seed of a question: it follows from its number, or its name, whatever was asked before."""
        own = int(number) if str(number).isdecimal() else zlib.crc32(str(number).encode())
        return self.seed + own

    def answer(
        self, conversations: Sequence[list[dict[str, Any]]], seeds: Sequence[int], task: dict[str, Any] | None = None
    ) -> list[Answer]:
        """
        Answers to one batch.

        Args:
            conversations (`Sequence[list[dict]]`): Chat messages, each to be answered.
            seeds (`Sequence[int]`): Of each, by `seed_of`.
            task (`dict`, *optional*): The task's own settings; those that do not concern this `output` are left out.

        Raises:
            ValueError: if a conversation for an answer in turn has more than one message.
        """
        task = {name: value for name, value in (task or {}).items() if value is not None}
        if "preset" in self.settings:
            # It is whole, and the benchmark's own.
            task = _named(task, {"until"})
        if self.output == "text" and "preset" not in self.settings:
            # How texts are sampled is the task's or the user's, and no mixture of both.
            own = _SAMPLING if self.settings.keys() & _SAMPLING else set()
            return self._written(conversations, seeds, _named(task, _WRITING - own | {"until"}) | self.settings)
        # How a task of pictures has texts sampled is meant for models that write what is then drawn.
        settings = _named(task, SETTINGS[self.output] - _SAMPLING) | self.settings
        if self.think is not None:
            settings["think"] = self.think
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if self.output == "image":
            return self._drawn(conversations, generators, settings)
        answers = self._in_turn(conversations, generators, settings)
        return answers if self.output != "text" else [_said(each.text, task.get("until", ())) for each in answers]

    def _written(
        self, conversations: Sequence[list[dict[str, Any]]], seeds: Sequence[int], settings: dict[str, Any]
    ) -> list[Answer]:
        settings = {"max_new_tokens": MAX_NEW_TOKENS} | settings
        if self.think and "max_new_tokens" not in self.settings:
            # A task means the answer alone, which comes behind the thoughts.
            settings["max_new_tokens"] += MAX_NEW_TOKENS
        until = settings.pop("until", None) or []
        temperature = settings.get("temperature")
        settings["do_sample"] = bool(settings.get("do_sample", temperature)) and temperature != 0
        if not settings["do_sample"]:
            settings = _named(settings, settings.keys() - _SAMPLING) | {"do_sample": False}
            return [_said(text, until) for text in self._texts(conversations, settings)]
        texts = []
        # One by one, each from its own seed, so that batches change nothing.
        for conversation, seed in zip(conversations, seeds, strict=True):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                texts += self._texts([conversation], settings)
        return [_said(text, until) for text in texts]

    def _texts(self, conversations: Sequence[list[dict[str, Any]]], settings: dict[str, Any]) -> list[str]:
        inputs = self.pipe.processor.apply_chat_template(
            list(conversations),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            think=bool(self.think),
        ).to(self.pipe.transformer.device)
        ids = self.pipe.transformer.generate(**inputs, **settings)
        return self.pipe.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _drawn(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        generators: list[torch.Generator],
        settings: dict[str, Any],
    ) -> list[Answer]:
        out = self.pipe(messages=list(conversations), generator=generators, **settings)
        plans = out.texts or [""] * len(out.images)
        return [
            Answer(plan, [{"type": "image", "image": picture}])
            for plan, picture in zip(plans, out.images, strict=True)
        ]

    def _in_turn(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        generators: list[torch.Generator],
        settings: dict[str, Any],
    ) -> list[Answer]:
        for messages in conversations:
            if len(messages) != 1:
                raise ValueError(f'`output="{self.output}"` answers one message, and a task gave {len(messages)}.')
        turns = [(BagelSession(self.pipe), messages[0]["content"]) for messages in conversations]
        replies = send_all(turns, self.output, generator=generators, **settings)
        return [Answer(reply.text, reply.content) for reply in replies]


def _named(settings: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in names}


def _said(words: str, until: str | Sequence[str]) -> Answer:
    """An answer in words, which ends where the task says."""
    text = words.rpartition("</think>")[2].strip()
    for end in filter(None, [until] if isinstance(until, str) else until):
        text = text.partition(end)[0]
    return Answer(text, [{"type": "text", "text": text}])
