# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Decoding that must follow a grammar, behind a picture: xgrammar and outlines with our tokenizer and `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import outlines
import xgrammar
from outlines.inputs import Chat
from outlines.inputs import Image as OutlinesImage
from PIL import Image, ImageDraw
from xgrammar.contrib.hf import LogitsProcessor

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor


CHECKPOINT = Path(__file__).parents[1] / "shapes" / "checkpoint"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def main() -> None:
    model = BagelForConditionalGeneration.from_pretrained(CHECKPOINT)
    processor = BagelProcessor.from_pretrained(CHECKPOINT)
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 20, 44, 44), fill="red")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "what colour is the circle?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    vocabulary = xgrammar.TokenizerInfo.from_huggingface(
        processor.tokenizer, vocab_size=model.config.get_text_config().vocab_size
    )
    grammar = xgrammar.GrammarCompiler(vocabulary).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
    ids = model.generate(**inputs, max_new_tokens=64, do_sample=False, logits_processor=[LogitsProcessor(grammar)])
    end = ids[0, -1].item()
    text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print("xgrammar", text, "ends with", processor.tokenizer.convert_ids_to_tokens(end))
    assert json.loads(text)["colour"] in ("red", "blue")
    assert end == model.generation_config.eos_token_id

    image.format = "PNG"  # which outlines wants to know
    chat = Chat([{"role": "user", "content": [{"type": "image", "image": OutlinesImage(image)}, parts[1]]}])
    steered = outlines.from_transformers(model, processor)
    for kind in (outlines.types.Regex("(red|blue) circle"), outlines.types.JsonSchema(SCHEMA, whitespace_pattern="")):
        said = steered(chat, kind, max_new_tokens=64, do_sample=False)
        print("outlines", said)
        assert said in ("red circle", "blue circle") or json.loads(said)["colour"] in ("red", "blue")


if __name__ == "__main__":
    main()
