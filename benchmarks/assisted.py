# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Text with candidates, looked up in the prompt or of an assistant: `python benchmarks/assisted.py --num 20`.

On bagel-shapes, whose prompts are pictures with questions, and on random weights of the middle width behind a picture. The
assistants are bagel-shapes' own first layers, which see the pictures, and a small Qwen2 of text alone, which is trained here
for a minute on what bagel-shapes was trained to say. All ways take turns at each prompt; the seconds are the processor's.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import make_pipeline
from PIL import Image
from refusals import need_at_least, need_output
from transformers import Qwen2Config, Qwen2ForCausalLM

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor, ForwardCounter


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples" / "shapes"))
SHAPES = ROOT / "examples" / "shapes" / "checkpoint"
# Makers of conversations of examples/shapes/tasks.py, and what their texts are called in the table.
TASKS = {"describe": "a picture described", "think_each_time": "a second thought about a picture"}
LOOKED_UP = {"prompt_lookup_num_tokens": 8}
LAYERS = 4


@dataclass
class Row:
    """What one way gave over all prompts of a kind."""

    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    texts: list[list[int]] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=20, help="prompts of each kind")
    parser.add_argument("--seconds", type=float, default=60, help="of training the assistant of text alone")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of a text")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(arguments)
    need_at_least(1, parser, args, "num", "tokens")
    need_output(parser, "json", args.json)
    print("| text | candidates | tokens | forwards | tokens a forward | CPU seconds | text as without |")
    print("|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    model, processor = BagelForConditionalGeneration.from_pretrained(SHAPES), BagelProcessor.from_pretrained(SHAPES)
    ways: dict[str, dict[str, Any]] = {
        "none": {},
        "looked up in the prompt": LOOKED_UP,
        f"first {LAYERS} of {len(model.model.language_model.layers)} layers": {"assistant_model": first_layers(model)},
        "a small Qwen2 of text alone": {"assistant_model": trained(processor, model, args.seconds)},
    }
    for task, name in TASKS.items():
        inputs = [prompt_of(processor, task, seed) for seed in range(args.num)]
        rows += compared(f"bagel-shapes: {name}", model, inputs, ways, args.tokens)
    pipe = make_pipeline("middle", torch.float32, torch.device("cpu"))
    inputs = [behind_a_picture(pipe.processor, seed) for seed in range(max(1, args.num // 10))]
    ways = {"none": {}, "looked up in the prompt": LOOKED_UP}
    ways["a random Qwen2 of text alone"] = {"assistant_model": small_model(pipe.transformer)}
    rows += compared("middle width, random weights", pipe.transformer, inputs, ways, args.tokens)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


def compared(
    name: str, model: BagelForConditionalGeneration, prompts: list[Any], ways: dict[str, dict[str, Any]], most: int
) -> list[dict[str, Any]]:
    """Write all texts in all ways, and print a row for each."""
    found = {way: Row() for way in ways}
    for settings in ways.values():
        # The first call warms up.
        model.generate(**prompts[0], **settings, max_new_tokens=most, do_sample=False)
    for inputs in prompts:
        for way, settings in ways.items():
            counter, start = ForwardCounter(), time.process_time()
            ids = model.generate(**inputs, **settings, max_new_tokens=most, do_sample=False, streamer=counter)
            row = found[way]
            row.seconds += time.process_time() - start
            row.tokens += counter.tokens
            row.texts.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    rows = []
    for way, row in found.items():
        figures = {"text": name, "candidates": way, "tokens": sum(row.tokens), "forwards": len(row.tokens)}
        equal = sum(own == plain for own, plain in zip(row.texts, found["none"].texts, strict=True))
        rows.append(figures | {"seconds": row.seconds, "equal": equal, "texts": len(row.texts)})
        rate = sum(row.tokens) / len(row.tokens)
        print(
            f"| {name} | {way} | {figures['tokens']} | {figures['forwards']} | {rate:.2f} | {row.seconds:.2f} | "
            f"{equal} of {len(row.texts)} |",
            flush=True,
        )
    return rows


def encoded(processor: BagelProcessor, messages: list[dict[str, Any]], is_prompt: bool) -> Any:
    return processor.apply_chat_template(
        messages, add_generation_prompt=is_prompt, tokenize=True, return_dict=True, return_tensors="pt"
    )


def prompt_of(processor: BagelProcessor, task: str, seed: int) -> Any:
    """A conversation of bagel-shapes up to its last answer."""
    from tasks import MAKERS

    messages = MAKERS[task](random.Random(f"assisted {seed}"))
    return encoded(processor, messages[:-1], is_prompt=True)


def behind_a_picture(processor: BagelProcessor, seed: int) -> Any:
    torch.manual_seed(seed)
    parts = [{"type": "image", "image": Image.effect_noise((224, 224), 64).convert("RGB")}]
    parts.append({"type": "text", "text": "how many shapes are there, and which colours have they?"})
    return encoded(processor, [{"role": "user", "content": parts}], is_prompt=True)


def first_layers(model: BagelForConditionalGeneration) -> BagelForConditionalGeneration:
    """A model of the first layers of another one and all else of it, for text alone."""
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers = LAYERS
    config.text_config.layer_types = config.text_config.layer_types[:LAYERS]
    cut = BagelForConditionalGeneration(config).eval()
    cut.load_state_dict({name: values for name, values in model.state_dict().items() if name in cut.state_dict()})
    return cut


def small_model(model: BagelForConditionalGeneration) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    text = model.config.text_config
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=text.vocab_size,
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
        )
    ).eval()


def trained(processor: BagelProcessor, model: BagelForConditionalGeneration, seconds: float) -> Qwen2ForCausalLM:
    """A small model of text alone that knows how bagel-shapes speaks, and nothing of the pictures that it speaks of."""
    from tasks import MAKERS

    small = small_model(model).train()
    optimizer = torch.optim.AdamW(small.parameters(), lr=2e-3)
    generator, start = random.Random("an assistant"), time.process_time()
    while time.process_time() - start < seconds:
        texts = []
        for _ in range(8):
            whole = encoded(processor, MAKERS[generator.choice(list(TASKS))](generator), is_prompt=False)
            texts.append(whole["input_ids"][whole["mm_token_type_ids"] == 0])
        labels = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)
        small(input_ids=labels.clamp(min=0), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return small.eval()


if __name__ == "__main__":
    main()
