# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a server of bagel-shapes does under load: `python benchmarks/serving.py --json serving.json`.

Clients draw, edit, ask and hold conversations at once; every picture is read and every text compared. What is not what was asked for
is asked of the pipeline itself, by the same seed: only where that does better, the server is wrong. Then, on a server that is else
idle, throughput, the time to the first token, and how soon a place is free whose client has gone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from machine import machine
from refusals import need_at_least, need_output


sys.path.append(str(Path(__file__).parents[1] / "examples" / "shapes"))

from judge import draw_cases  # noqa: E402
from load_clients import PLAN, Asked, Talker, drawing_of, image_of, is_answered_by_itself  # noqa: E402
from parts import CHECKPOINT  # noqa: E402
from serving_process import ServerProcess, total  # noqa: E402

from diffusers_bagel import BagelPipeline  # noqa: E402


# Of conversations that are kept: a bound that is reached soon, behind which memory must not grow.
CACHE_BYTES = 32 * 2**20
STEPS_TO_LEAVE = 200


async def load(server: ServerProcess, clients: int, seconds: float) -> dict[str, Any]:
    """Everything at once, for a while: what was asked and answered, what was lost, and the memory of the server."""
    done: list[Asked] = []
    lost: list[str] = []
    deadline = time.monotonic() + seconds
    async with server.client(clients) as http:
        talkers = [Talker(http, index, deadline, done, lost) for index in range(clients)]
        watch = asyncio.create_task(server.memory())
        began = time.monotonic()
        await asyncio.gather(*(talker.talk() for talker in talkers))
        elapsed = time.monotonic() - began
        watch.cancel()
    return {
        "asked": done,
        "lost": lost,
        "seconds": elapsed,
        "memory": server.samples,
        "waits": sum(t.waits for t in talkers),
    }


def growth(samples: Sequence[tuple[float, int]], seconds: float) -> float:
    """The most memory behind the first minute, or the first third of a shorter run, less what it was then, as a share of that."""
    start = min(60.0, seconds / 3)
    later = [size for when, size in samples if start <= when <= seconds]
    return max(later) / statistics.median(later[:5]) - 1


async def text_rate(http: httpx.AsyncClient, clients: int, rounds: int) -> float:
    """Tokens per second of clients that each ask for one text after the other."""
    prompts = [case.prompt for case in draw_cases("draw_full", clients * rounds, seed=1, num_things=3)]

    async def ask(own: Sequence[str]) -> int:
        answers = [await http.post("chat/completions", json=PLAN | {"messages": [user(prompt)]}) for prompt in own]
        return sum(answer.raise_for_status().json()["usage"]["completion_tokens"] for answer in answers)

    began = time.perf_counter()
    tokens = await asyncio.gather(*(ask(prompts[index::clients]) for index in range(clients)))
    return sum(tokens) / (time.perf_counter() - began)


async def text_rates(http: httpx.AsyncClient, clients: int, repeats: int) -> dict[str, Any]:
    """Of several clients and of one, which take turns."""
    await text_rate(http, clients, 1)
    pairs = [(await text_rate(http, 1, clients), await text_rate(http, clients, 4)) for _ in range(repeats)]
    one, many = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    return {"one": one, "many": many, "ratio": statistics.median(many / one for one, many in pairs)}


async def draw_rates(http: httpx.AsyncClient, pipe: BagelPipeline, count: int, repeats: int) -> dict[str, Any]:
    """Pictures per second of so many clients, and of the pipeline's batch of as many, which take turns."""
    prompts = [case.prompt for case in draw_cases("draw_full", count, seed=2)]
    pairs = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        bodies = [drawing_of(prompt, seed) for seed, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*(http.post("images/generations", json=body) for body in bodies))
        pictures = [image_of(answer.raise_for_status().json()["data"][0]["b64_json"]) for answer in answers]
        served = time.perf_counter() - began
        began = time.perf_counter()
        settings = {name: bodies[0][name] for name in ("num_inference_steps", "guidance_scale")}
        pipe(prompts, generator=[torch.Generator().manual_seed(seed) for seed in range(count)], **settings)
        pairs.append((len(pictures) / served, count / (time.perf_counter() - began)))
    # The first pair warms up.
    served_rate, own_rate = (statistics.median(rates) for rates in zip(*pairs[1:], strict=True))
    return {"server": served_rate, "pipeline": own_rate, "ratio": statistics.median(a / b for a, b in pairs[1:])}


async def first_token(http: httpx.AsyncClient, pipe: BagelPipeline, tokens: int, repeats: int) -> dict[str, Any]:
    """From a request to the first word of its answer, beside the forward of what it says; each request says something new."""
    pairs = []
    for index in range(repeats + 1):
        text = long_text(pipe, tokens, index)
        body = {"messages": [user(text)], "max_tokens": 8, "stream": True, "output": "text"}
        waited = 0.0
        began = time.perf_counter()
        async with http.stream("POST", "chat/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not waited and line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    waited = (time.perf_counter() - began) * bool(choices and choices[0]["delta"].get("content"))
        pairs.append((waited, prefill_seconds(pipe, text)))
    waited, own = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
    return {"server": waited, "prefill": own, "ratio": statistics.median(a / b for a, b in pairs[1:])}


def long_text(pipe: BagelPipeline, tokens: int, index: int) -> str:
    words = " and ".join(case.prompt for case in draw_cases("draw_full", 1 + tokens // 16, seed=100 + index))
    tokenizer = pipe.processor.tokenizer
    return tokenizer.decode(tokenizer(words)["input_ids"][:tokens])


@torch.no_grad()
def prefill_seconds(pipe: BagelPipeline, text: str) -> float:
    inputs = pipe.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": text}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    began = time.perf_counter()
    pipe.transformer(**inputs, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - began


async def steps_behind(server: ServerProcess, http: httpx.AsyncClient, after: int) -> int:
    """Steps that are made of a picture whose client leaves when it has heard of so many."""
    before = total(await server.metrics(http), "bagel_engine_steps_total")
    body = drawing_of("a large red star in the middle on white", 0) | {
        "num_inference_steps": STEPS_TO_LEAVE,
        "stream": True,
    }
    heard = 0
    async with http.stream("POST", "images/generations", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            heard += line.startswith("event: ") and line.endswith(".progress")
            if heard == after:
                break
    while total(metrics := await server.metrics(http), "bagel_engine_running"):
        await asyncio.sleep(0.001)
    return int(total(metrics, "bagel_engine_steps_total") - before) - heard


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def judged(asked: Sequence[Asked], pipe: BagelPipeline) -> dict[str, dict[str, int]]:
    """Of each kind how many answers there are, how many are not what was asked for, and at how many the pipeline does better."""
    counts: dict[str, dict[str, int]] = {}
    for each in asked:
        count = counts.setdefault(each.kind, {"answers": 0, "not as asked": 0, "wrong": 0})
        count["answers"] += 1
        if not each.is_right:
            count["not as asked"] += 1
            count["wrong"] += not is_answered_by_itself(pipe, each)
    return counts


def noted(what: str, figure: Any) -> Any:
    """The figure, told to who waits for the table."""
    print(f"{what}: {figure}", file=sys.stderr, flush=True)
    return figure


async def measured(args: argparse.Namespace, pipe: BagelPipeline) -> dict[str, Any]:
    """All figures."""
    figures: dict[str, Any] = {}
    with ServerProcess(args.checkpoint, args.clients, CACHE_BYTES) as server:
        async with server.client(args.text_clients) as http:
            figures["text"] = noted("text", await text_rates(http, args.text_clients, args.repeats))
            figures["drawing"] = noted("drawing", await draw_rates(http, pipe, args.batch, args.repeats))
            figures["first token"] = noted("first token", await first_token(http, pipe, args.tokens, 4 * args.repeats))
            behind = [await steps_behind(server, http, 3 + index) for index in range(4 * args.repeats)]
            figures["steps behind"] = noted("steps behind", behind)
        found = await load(server, args.clients, args.seconds)
        async with server.client(1) as http:
            metrics = await server.metrics(http)
    figures["left"] = total(metrics, "bagel_engine_running") + total(metrics, "bagel_engine_waiting")
    figures["growth"] = growth(found["memory"], args.seconds)
    figures |= {name: found[name] for name in ("lost", "seconds", "waits", "memory")}
    noted("answers to judge", len(found["asked"]))
    figures["answers"] = judged(found["asked"], pipe)
    return figures


def rows(figures: dict[str, Any], args: argparse.Namespace) -> list[tuple[str, str, str, bool]]:
    """What was to be reached, what was, and whether."""
    kinds = figures["answers"]
    answers, unasked, wrong = (
        sum(kind[name] for kind in kinds.values()) for name in ("answers", "not as asked", "wrong")
    )
    text, drawing, first = figures["text"], figures["drawing"], figures["first token"]
    most = max(figures["steps behind"])
    asked = ", ".join(f"{kind['answers']:,} {name}" for name, kind in kinds.items())
    made = f"{args.clients} clients, {figures['seconds']:.0f} s: {asked}"
    checks: list[tuple[str, str, str, bool]] = [
        (
            f"wrong answers ({made})",
            "0",
            f"{wrong} ({unasked} not as asked, of which the pipeline gives {unasked - wrong} itself)",
            wrong == 0 and answers > 0,
        ),
        ("requests lost", "0", str(len(figures["lost"])), not figures["lost"]),
        ("places taken at the end", "0", f"{figures['left']:.0f}", figures["left"] == 0),
        ("growth of memory behind the first minute", "5 %", f"{figures['growth']:.1%}", figures["growth"] <= 0.05),
        (
            f"text: {args.text_clients} clients beside one",
            "4 x",
            f"{text['ratio']:.2f} x ({text['many']:.0f} and {text['one']:.0f} tokens/s)",
            text["ratio"] >= 4,
        ),
        (
            f"drawing: {args.batch} clients beside the pipeline's batch of {args.batch}",
            "1 x",
            f"{drawing['ratio']:.2f} x ({drawing['server']:.2f} and {drawing['pipeline']:.2f} pictures/s)",
            drawing["ratio"] >= 1,
        ),
        (
            f"first token behind {args.tokens:,} tokens, beside their forward",
            "1.2 x",
            f"{first['ratio']:.2f} x ({1000 * first['server']:.0f} and {1000 * first['prefill']:.0f} ms)",
            first["ratio"] <= 1.2,
        ),
        (f"steps behind a client that leaves, most of {len(figures['steps behind'])}", "1", str(most), most <= 1),
    ]
    return checks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=os.path.relpath(CHECKPOINT))
    parser.add_argument("--seconds", type=float, default=300, help="of the load")
    parser.add_argument("--clients", type=int, default=100, help="of the load")
    parser.add_argument("--text-clients", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time")
    parser.add_argument("--tokens", type=int, default=2000, help="before the first token")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(arguments)
    need_at_least(1, parser, args, "seconds", "clients", "text_clients", "batch", "tokens", "repeats")
    need_output(parser, "json", args.json)
    pipe = BagelPipeline.from_pretrained(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    figures = asyncio.run(measured(args, pipe))
    print("| what | wanted | reached | held |\n|---|---|---|---|")
    for what, wanted, reached, is_held in rows(figures, args):
        print(f"| {what} | {wanted} | {reached} | {'yes' if is_held else 'no'} |")
    if args.json:
        args.json.write_text(json.dumps(machine(None) | vars(args) | figures, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
