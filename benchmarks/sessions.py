# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What conversations cost: `python benchmarks/sessions.py --json sessions.json`.

How soon a second turn after a long context answers, beside the forward of its own tokens; how many sessions answer in a second,
one after the other and together; and what is kept of turns that draw. What is compared takes turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import machine
from models import WIDTHS, make_pipeline
from refusals import need_at_least, need_output
from run import DTYPES
from timing import default_device, median_and_spread, seconds_of, synchronize

from diffusers_bagel import BagelPipeline, BagelSession, send_all
from diffusers_bagel.contexts import BagelContext


SENTENCE = "a red circle left of a large blue square on a yellow ground, drawn with a soft pencil in the evening, "
QUESTION = "what colour is the circle, and where is it?"


def text_of(pipe: BagelPipeline, tokens: int) -> str:
    """Words of so many tokens, the markers around them included."""
    tokenizer = pipe.processor.tokenizer
    ids = tokenizer(SENTENCE * (1 + tokens // 20))["input_ids"]
    return tokenizer.decode(ids[: tokens - 2])


class FirstToken:
    """Notes when the first token of an answer is chosen."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.time:
            synchronize(scores.device)
            self.time = time.perf_counter()
        return scores


def second_turn(pipe: BagelPipeline, context: int, repeats: int) -> Iterator[dict[str, Any]]:
    """From the call to the first token, beside one forward of the tokens that are new, into the same cache."""
    session = BagelSession(pipe)
    session.send(text_of(pipe, context), output="text", max_new_tokens=4)
    seconds: dict[str, list[float]] = {"forward": [], "send": [], "stream": []}

    def answer(streams: bool) -> None:
        other, first = session.fork(), FirstToken()
        # What is said to it first makes the fork's cache one of its own.
        other.send("a", output="text", max_new_tokens=1)
        start = time.perf_counter()
        if streams:
            for _ in other.stream(QUESTION, output="text", max_new_tokens=1, logits_processor=[first]):
                pass
        else:
            other.send(QUESTION, output="text", max_new_tokens=1, logits_processor=[first])
        seconds["stream" if streams else "send"].append(first.time - start)
        with torch.no_grad():
            seconds["forward"].append(own_forward(other))

    def own_forward(other: BagelSession) -> float:
        """Of the question, what was left of the answer before, and the token that starts the next one."""
        before = other._read.nearest(other._said.seen.full)
        new = 2 + len(other._said.seen.full[-2]) + 1
        ids = torch.randint(5, 400, (1, new), device=session._device)
        positions = before.next_position + torch.arange(new, device=session._device)[None]
        start = time.perf_counter()
        pipe.transformer(
            input_ids=ids, position_ids=positions, past_key_values=before.cache, use_cache=True, logits_to_keep=1
        )
        synchronize(ids.device)
        return time.perf_counter() - start

    for _ in range(repeats + 1):
        answer(streams=False)
        answer(streams=True)
    floors = seconds["forward"]
    # The first pair warms up.
    for name, own in (("send", floors[2::2]), ("stream", floors[3::2])):
        found = seconds[name][1:]
        (median, spread), floor = median_and_spread(found), statistics.median(own)
        ratio = statistics.median(a / b for a, b in zip(found, own, strict=True))
        yield {
            "what": f"first token of a second turn after {context:,} tokens, `{name}`",
            "seconds": median,
            "spread": spread,
            "floor_seconds": floor,
            "ratio": ratio,
        }


def throughput(pipe: BagelPipeline, count: int, context: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Texts of several sessions, one after the other and together, each behind a context of its own length."""
    sessions = [BagelSession(pipe) for _ in range(count)]
    for index, session in enumerate(sessions):
        session.send(text_of(pipe, context - index * context // (2 * count)), output="text", max_new_tokens=1)
    settings: dict[str, Any] = {"output": "text", "max_new_tokens": tokens, "logits_processor": [never_ends(pipe)]}

    def alone() -> None:
        for session in [session.fork() for session in sessions]:
            session.send(QUESTION, **settings)

    def together() -> None:
        send_all([(session.fork(), QUESTION) for session in sessions], **settings)

    singles, batches = seconds_of((alone, together), repeats, default_device())
    (single, _), (batch, spread) = median_and_spread(singles), median_and_spread(batches)
    return {
        "what": f"{count} sessions after {context // 2:,} to {context:,} tokens, {tokens} tokens each",
        "seconds": batch,
        "spread": spread,
        "alone_seconds": single,
        "rate": count * tokens / batch,
        "alone_rate": count * tokens / single,
        "ratio": statistics.median(one / all_ for one, all_ in zip(singles, batches, strict=True)),
    }


def never_ends(pipe: BagelPipeline) -> Callable:
    end = pipe.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def without_end(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, end] = -torch.inf
        return scores

    return without_end


def drawn_turns(pipe: BagelPipeline, turns: int, pixels: int) -> dict[str, Any]:
    """Keys and values that a session keeps after turns that draw, beside one copy of the tokens that it has read."""
    session = BagelSession(pipe)
    size = {"height": pixels, "width": pixels, "num_inference_steps": 1, "guidance_scale": 4.0}
    for turn in range(turns):
        session.send(SENTENCE * (1 + turn % 2), output="image", **size)
    text = pipe.transformer.config.text_config
    heads = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    of_token = 2 * text.num_hidden_layers * heads * pipe.transformer.dtype.itemsize
    contexts = session._read._contexts
    tokens = sum(context.held - (context.prefix.length if context.prefix else 0) for context in contexts)
    return {
        "what": f"{turns} turns that draw at {pixels} px",
        "tokens": tokens,
        "one_copy_bytes": tokens * of_token,
        "kept_bytes": kept_bytes(contexts),
    }


def kept_bytes(contexts: list[BagelContext]) -> int:
    """Of all tensors that contexts keep alive, each counted once."""
    storages = {}
    for context in contexts:
        for cache in (context.cache, *((context.prefix.cache,) if context.prefix else ())):
            for layer in cache.layers:
                for states in (layer.keys, layer.values):
                    storages[states.untyped_storage().data_ptr()] = states.untyped_storage().nbytes()
    return sum(storages.values())


def table_row(row: dict[str, Any]) -> str:
    if "kept_bytes" in row:
        cells = [f"{row[key] / 2**20:,.1f} MiB" for key in ("one_copy_bytes", "kept_bytes")]
        return f"| {row['what']}, {row['tokens']:,} tokens | {' | '.join(cells)} | {row['kept_bytes'] / row['one_copy_bytes']:.3f} |"
    if "rate" in row:
        cells = [f"{row[key]:.1f} tokens/s" for key in ("alone_rate", "rate")]
    else:
        cells = [f"{1000 * row[key]:.1f} ms" for key in ("floor_seconds", "seconds")]
    return f"| {row['what']} | {' | '.join(cells)} | {row['ratio']:.2f} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=tuple(WIDTHS), default="middle")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--context", type=int, default=2400, help="tokens before the second turn")
    parser.add_argument("--sessions", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--turns", type=int, default=10, help="that draw; 0 leaves them out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the CPU; by default all cores")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(arguments)
    need_at_least(1, parser, args, "context", "sessions", "tokens", "repeats", "threads")
    need_at_least(0, parser, args, "turns")
    need_output(parser, "json", args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(table_row(row), flush=True)
        if args.json:
            figures = machine(args.threads) | {"width": args.width, "dtype": args.dtype, "rows": rows}
            args.json.write_text(json.dumps(figures, indent=2) + "\n")

    pipe = make_pipeline(args.width, DTYPES[args.dtype], default_device())
    print("| what | floor, one by one, or one copy | this | ratio |\n|---|---|---|---|")
    for row in second_turn(pipe, args.context, 4 * args.repeats):
        add(row)
    for count in args.sessions:
        for context in (args.context, 64):
            add(throughput(pipe, count, context, args.tokens, args.repeats))
    if args.turns:
        add(drawn_turns(pipe, args.turns, 512))


if __name__ == "__main__":
    main()
