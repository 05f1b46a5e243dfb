# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL as a model of lmms-eval, which finds it as `bagel_hf` once this package is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from transformers.utils import logging

from diffusers_bagel.inputs import check_whole_number
from transformers_bagel.errors import shown

from .answers import Answerer


class BagelHF(lmms):
    """
    BAGEL in lmms-eval: `--model bagel_hf --model_args pretrained=...,output=text|image|interleaved|auto,think=True`.

    An answer in words is those words; any other is a line of JSON, `{"text": ..., "images": [files], "content": [...]}`, as the
    harness' tasks of pictures read it.

    Args:
        pretrained (`str`): Hub id or folder.
        batch_size (`int`, *optional*, defaults to 1): Questions that are answered together.
        device (`str`, *optional*): By default that which `accelerate launch` gives this process.
        output_dir (`str`, *optional*, defaults to `"bagel_hf_pictures"`): Where pictures are saved.
        settings: Of [`Answerer`].
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        output_dir: str = "bagel_hf_pictures",
        **settings: Any,
    ):
        super().__init__()
        # A word, as of the command line.
        size = int(batch_size) if str(batch_size).isdecimal() else batch_size
        check_whole_number("batch_size", size, 1, max_batch_size)
        self.batch_size, self.output_dir = int(size), output_dir
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = device if device and self._world_size == 1 else self.accelerator.device
        self.answerer = Answerer(pretrained, device=str(self.device), **settings)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, in the order of the requests."""
        answers: dict[int, str] = {}
        with logging.tqdm(total=len(requests), disable=self.rank != 0, desc="BAGEL answers") as progress:
            for batch in _batches(requests, self.batch_size):
                answers |= zip(batch, self._answers([requests[index] for index in batch]), strict=True)
                progress.update(len(batch))
        return [answers[index] for index in range(len(requests))]

    def _answers(self, requests: Sequence[Instance]) -> list[str]:
        """Answers to requests of the same settings."""
        conversations, seeds, names = [], [], []
        for request in requests:
            _, doc_to_messages, settings, doc_id, task, split = request.args
            conversations.append([_message(given) for given in doc_to_messages(self.task_dict[task][split][doc_id])])
            seeds.append(self.answerer.seed_of(doc_id))
            names.append(f"{task}_{doc_id}")
        answers = self.answerer.answer(conversations, seeds, settings)
        if self.answerer.output == "text":
            return [answer.text for answer in answers]
        saved = [answer.saved(self.output_dir, name) for answer, name in zip(answers, names, strict=True)]
        return [json.dumps(each, ensure_ascii=False) for each in saved]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "`bagel_hf` writes and draws; lm-evaluation-harness measures likelihoods with BAGEL."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("`bagel_hf` answers once; tasks of `generate_until_multi_round` go on.")


def _batches(requests: Sequence[Instance], size: int) -> Iterator[list[int]]:
    """Indices of requests of the same settings."""
    alike: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        alike.setdefault(repr(request.args[2]), []).append(index)
    for indices in alike.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _message(given: dict[str, Any]) -> dict[str, Any]:
    """A message of the harness as one of transformers."""
    content = given["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(part) for part in content]
    return {"role": given["role"], "content": parts}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "image":
        raise ValueError(f"BAGEL reads texts and images, and the task has {shown(part['type'])}.")
    return {"type": "image", "image": part["url"]}
