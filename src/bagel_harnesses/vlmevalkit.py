# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""
BAGEL as a model of VLMEvalKit, either by its own command with this model added,

    python -m bagel_harnesses.vlmevalkit --model bagel_hf --data MMBench_DEV_EN

or by this line in `vlmeval/config.py`, for its own `run.py`:

    supported_VLM["bagel_hf"] = partial(BagelHF, model_path="ByteDance-Seed/BAGEL-7B-MoT")
"""

from __future__ import annotations

import json
import zlib
from functools import partial
from typing import Any

from vlmeval.vlm.base import BaseModel

from transformers_bagel.errors import shown

from .answers import Answerer


class BagelHF(BaseModel):
    """
    BAGEL in VLMEvalKit. Words are answered as they are, a drawing as the name of its file, answers in words and pictures as a
    line of JSON. The kit asks one question at a time.

    Args:
        model_path (`str`): Hub id or folder.
        output_dir (`str`, *optional*, defaults to `"bagel_hf_pictures"`): Where pictures are saved.
        settings: Of [`Answerer`].
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(self, model_path: str, output_dir: str = "bagel_hf_pictures", **settings: Any):
        super().__init__()
        self.output_dir = output_dir
        self.answerer = Answerer(model_path, **settings)

    def use_custom_prompt(self, dataset: str) -> bool:
        """For pictures, whose noise follows from the number of the question, which no prompt of the kit's own has."""
        return self.answerer.output != "text"

    def build_prompt(self, line: Any, dataset: str) -> list[dict[str, Any]]:
        """The images of a line, and its question, which carries the line's number."""
        has_images = "image" in line or "image_path" in line
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)] if has_images else []
        return [*images, {"type": "text", "value": line["question"], "index": line["index"]}]

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to one question."""
        return self._answer([{"role": "user", "content": message}], dataset)

    def chat_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last of several messages."""
        return self._answer(message, dataset)

    def _answer(self, messages: list[dict[str, Any]], dataset: str | None) -> str:
        numbers = [part["index"] for message in messages for part in message["content"] if "index" in part]
        # A data set that insists on its own prompts gives no number.
        number = numbers[-1] if numbers else zlib.crc32(repr(messages).encode())
        conversation = [
            {"role": message["role"], "content": [_part(part) for part in message["content"]]} for message in messages
        ]
        (answer,) = self.answerer.answer([conversation], [self.answerer.seed_of(number)])
        if self.answerer.output == "text":
            return answer.text
        saved = answer.saved(self.output_dir, f"{dataset}_{number}")
        return saved["images"][0] if self.answerer.output == "image" else json.dumps(saved, ensure_ascii=False)


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] not in ("text", "image"):
        raise ValueError(f"BAGEL reads texts and images, and the data set has {shown(part['type'])}.")
    return {"type": part["type"], part["type"]: part["value"]}


def main() -> None:
    """The kit's own command, which then knows this model by name, and its class in a `--config`."""
    import vlmeval.vlm
    from vlmeval.config import supported_VLM
    from vlmeval.run import main as run

    vlmeval.vlm.BagelHF = BagelHF
    supported_VLM["bagel_hf"] = partial(BagelHF, model_path="ByteDance-Seed/BAGEL-7B-MoT")
    run()


if __name__ == "__main__":
    main()
