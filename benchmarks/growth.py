# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Curves of the cost of each pass beside the cost model: `python benchmarks/growth.py --output benchmarks/results/growth`.

Writes OUTPUT.json and OUTPUT.png, and prints the table of docs/growth.md. Random weights, float32. The rates that the cost
model is given (`cost.py`) are those of a bare matrix product, attention and product with a vector in the same run;
nothing is fitted to the curves. With `--drawn-from FILE` the picture and the table are made of an earlier run's figures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cost
import matplotlib
import torch
from cost import Cost, Rates
from machine import machine
from models import WIDTHS, make_config, write_tokens
from refusals import need_at_least, need_output
from timing import default_device, seconds_of
from torch.nn.functional import scaled_dot_product_attention

from transformers_bagel import BagelConfig, BagelForConditionalGeneration, GrowingCache, PrefixCache, fork_cache


matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402  # after the choice of a backend without a display
from matplotlib.axes import Axes  # noqa: E402


ITEMSIZE = torch.float32.itemsize
# Of a prompt.
PROMPT = 32
NEW_TOKENS = 16


@dataclass(frozen=True)
class Pass:
    """A pass to be measured, with what it costs by the model."""

    call: Callable[[], object]
    cost: Cost
    count: int = 1


@dataclass(frozen=True)
class Curve:
    """
    A pass to be measured at several sizes.

    Attributes:
        name (`str`)
        along (`str`): What grows.
        points (`tuple[int, ...]`): Its values.
        make (`Callable[[BagelForConditionalGeneration, int], Pass]`)
        with_memory (`bool`): Whether to measure the peak of memory, too.
    """

    name: str
    along: str
    points: tuple[int, ...]
    make: Callable[[BagelForConditionalGeneration, int], Pass]
    with_memory: bool = False


def curves() -> list[Curve]:
    """All of them, in the order of the table."""
    steps = (0, 512, 1024, 2048, 4096, 8192)
    return [
        Curve("denoise", "latent tokens", (64, 256, 1024, 2304, 4096), denoise, with_memory=True),
        Curve("denoise, 256 latents", "images", (1, 2, 4, 8), lambda model, n: denoise(model, 256, images=n)),
        Curve("denoise, 1,024 latents", "branches", (1, 2, 3), lambda model, n: denoise(model, 1024, images=n)),
        Curve("denoise, 1,024 latents", "prefix tokens", steps, lambda model, n: denoise(model, 1024, prefix=n)),
        Curve("prefill", "tokens", (64, 256, 1024, 2048, 4096), prefill),
        Curve("decode", "prefix tokens", (64, *steps[1:]), decode),
        Curve("decode after 1,024 tokens", "samples", (1, 2, 4, 8, 16), lambda model, n: decode(model, 1024, n)),
        Curve("training", "latent tokens", (64, 256, 1024, 2304), training, with_memory=True),
    ]


def filled_cache(config: BagelConfig, length: int, batch: int = 1) -> GrowingCache:
    """Random keys and values."""
    text = config.get_text_config()
    cache = GrowingCache(config)
    for layer in range(text.num_hidden_layers):
        shape = (batch, text.num_key_value_heads, length, text.hidden_size // text.num_attention_heads)
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def random_ids(*shape: int) -> torch.Tensor:
    # Below the tokenizer's special tokens.
    return torch.randint(5, 400, shape)


def grid_of(latents: int) -> tuple[int, int]:
    side = math.isqrt(latents)
    assert side**2 == latents, f"{latents} latents are no square"
    return side, side


def denoise(model: BagelForConditionalGeneration, latents: int, images: int = 1, prefix: int = PROMPT) -> Pass:
    """A step of blocks of one size, each behind the same prefix; to the model a branch is one more image."""
    one = PrefixCache.from_cache(filled_cache(model.config, prefix), scratch=latents + 2)
    inputs = {
        "latents": torch.randn(images * latents, model.config.latent_dim),
        "latent_grid_hw": torch.tensor([grid_of(latents)] * images),
        "timesteps": torch.full((images,), 0.5),
        "position_ids": torch.full((images,), prefix),
        "past_key_values": one.select([0] * images),
    }
    expected = cost.denoise(model.config, [latents] * images, [prefix] * images, ITEMSIZE)
    return Pass(torch.no_grad()(lambda: model(**inputs)), expected)


def prefill(model: BagelForConditionalGeneration, tokens: int) -> Pass:
    ids = random_ids(1, tokens)
    expected = cost.prefill(model.config, tokens, cost.causal_pairs(tokens), ITEMSIZE)
    return Pass(torch.no_grad()(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)), expected)


def decode(model: BagelForConditionalGeneration, prefix: int, batch: int = 1) -> Pass:
    """`generate()` after what is in the cache already."""
    ids = random_ids(batch, prefix + 1)
    cache = filled_cache(model.config, prefix, batch)

    def call() -> None:
        write_tokens(model, ids, fork_cache(cache), NEW_TOKENS)

    return Pass(call, cost.decode(model.config, prefix + NEW_TOKENS // 2, batch, ITEMSIZE), NEW_TOKENS)


def training(model: BagelForConditionalGeneration, latents: int) -> Pass:
    """Forward and backward of one drawing after its prompt."""
    config = model.config
    ids = torch.full((1, PROMPT + latents + 2), config.latent_token_id)
    ids[:, :PROMPT] = random_ids(PROMPT)
    ids[:, PROMPT], ids[:, -1] = config.vision_start_token_id, config.vision_end_token_id
    labels = torch.full_like(ids, -100)
    labels[:, 1:PROMPT] = ids[:, 1:PROMPT]
    inputs = {
        "input_ids": ids,
        "labels": labels,
        "document_ids": torch.zeros_like(ids),
        "latents": torch.randn(latents, config.latent_dim),
        "noise": torch.randn(latents, config.latent_dim),
        "latent_grid_hw": torch.tensor([grid_of(latents)]),
        "timesteps": torch.tensor([0.5]),
    }

    def call() -> None:
        model.train()
        model(**inputs).loss.backward()
        model.zero_grad()
        model.eval()

    return Pass(call, cost.training(config, PROMPT + 2, latents, PROMPT - 1, ids.shape[1] ** 2))


def measured_rates(repeats: int, size: int = 2048) -> Rates:
    """Best rates of a square product, of attention among `2 * size` tokens, and of a product with a vector."""
    square, matrix = torch.randn(size, size), torch.randn(4 * size, 4 * size)
    heads, vector = torch.randn(1, 8, 2 * size, 64), torch.randn(4 * size)
    runs = (
        lambda: torch.mm(square, square),
        lambda: scaled_dot_product_attention(heads, heads, heads),
        lambda: torch.mv(matrix, vector),
    )
    best = [min(found) for found in seconds_of(runs, repeats, default_device())]
    pairs = heads.shape[1] * heads.shape[2] ** 2
    return Rates(2 * size**3 / best[0], 4 * pairs * heads.shape[3] / best[1], matrix.nbytes / best[2])


def peak_of_tensors(call: Callable[[], object]) -> int:
    """Bytes of the tensors that a call makes, at their most; what was there before does not count."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    records = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        held += record.nbytes()
        peak = max(peak, held)
    return peak


def measure(curve: Curve, model: BagelForConditionalGeneration, rates: Rates, repeats: int) -> dict[str, Any]:
    """Figures of a curve; seconds are those of one pass, and of the fastest call, as the rates are."""
    points = []
    for value in curve.points:
        run = curve.make(model, value)
        (times,) = seconds_of((run.call,), repeats, default_device())
        points.append(
            {
                "value": value,
                "seconds": min(times) / run.count,
                "slowest": max(times) / run.count,
                "products": cost.product_seconds(run.cost, rates),
                "attention": cost.attention_seconds(run.cost, rates),
                "cost": asdict(run.cost),
            }
        )
        if curve.with_memory:
            points[-1]["peak_bytes"] = peak_of_tensors(run.call)
    return {"name": curve.name, "along": curve.along, "points": points}


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of the line through the logarithms, by least squares; zero has none and is left out."""
    logs = [(math.log(value), math.log(seconds)) for value, seconds in zip(values, costs, strict=True) if value > 0]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def summary(curve: dict[str, Any]) -> dict[str, float]:
    """Exponents of a curve, and where the time of its last point goes."""
    points = curve["points"]
    values, times = ([point[key] for point in points] for key in ("value", "seconds"))
    operations = [sum(point["cost"][key] for key in ("products", "attention")) for point in points]
    last = points[-1]
    return {
        "exponent": exponent(values, times),
        "last_exponent": exponent(values[-2:], times[-2:]),
        "last_operations": exponent(values[-2:], operations[-2:]),
        "rate": operations[-1] / last["seconds"],
        "products": last["products"] / last["seconds"],
        "attention": last["attention"] / last["seconds"],
    }


def shortest(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def table(figures: dict[str, Any]) -> str:
    """The Markdown table of the documentation."""
    lines = [
        "| | from | to | exponent | at the end | operations' | products | attention | rest | GFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for curve in figures["curves"]:
        found, points = summary(curve), curve["points"]
        ends = [f"{point['value']:,}: {shortest(point['seconds'])}" for point in (points[0], points[-1])]
        exponents = [f"{found[key]:.2f}" for key in ("exponent", "last_exponent", "last_operations")]
        shares = (found["products"], found["attention"], 1 - found["products"] - found["attention"])
        cells = [f"{curve['name']}, by {curve['along']}", *ends, *exponents]
        cells += [*(f"{100 * share:.0f} %" for share in shares), f"{found['rate'] / 1e9:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rates_line(rates: dict[str, float]) -> str:
    gigas = [f"{rates[key] / 1e9:.0f}" for key in ("products", "attention", "bandwidth")]
    return f"{gigas[0]} GFLOP/s in matrix products, {gigas[1]} GFLOP/s in attention, {gigas[2]} GB/s from memory"


def agreement(figures: dict[str, Any]) -> str:
    """How much of the time the cost model tells, of passes of at least 1,024 tokens beside the decoding."""
    told = [
        (point["products"] + point["attention"]) / point["seconds"]
        for curve in figures["curves"]
        if "decode" not in curve["name"]
        for point in curve["points"]
        if "1,024" in curve["name"] or point["value"] >= 1024
    ]
    low, middle, high = (100 * share for share in (min(told), statistics.median(told), max(told)))
    return f"{low:.0f} to {high:.0f} % of the time, {middle:.0f} % in the median of {len(told)} points"


def plot(axis: Axes, curve: dict[str, Any]) -> None:
    points = curve["points"]
    values = [point["value"] for point in points]
    axis.plot(values, [point["seconds"] for point in points], "o-", markersize=3, label="measured")
    axis.plot(values, [point["products"] + point["attention"] for point in points], "--", label="cost model")
    axis.plot(values, [point["products"] for point in points], ":", label="its linear layers")
    if min(values) > 0:
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(values, [f"{value:,}" for value in values], fontsize=7)
        axis.set_xticks([], minor=True)
        axis.set_title(f"{curve['name']}: exponent {summary(curve)['exponent']:.2f}", fontsize=9)
    else:
        axis.set_title(curve["name"], fontsize=9)
        axis.set_ylim(bottom=0)
    axis.set(xlabel=curve["along"], ylabel="seconds")
    axis.grid(alpha=0.3, which="both")


def plot_memory(axis: Axes, measured: list[dict[str, Any]]) -> None:
    for curve in measured:
        points = [point for point in curve["points"] if "peak_bytes" in point]
        if points:
            values, peaks = ([point[key] for point in points] for key in ("value", "peak_bytes"))
            axis.loglog(values, [peak / 2**20 for peak in peaks], "o-", markersize=3, label=curve["name"])
    axis.set_title("peak of the tensors of a pass", fontsize=9)
    axis.set(xlabel="latent tokens", ylabel="MiB")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)


def draw(figures: dict[str, Any], file: Path) -> None:
    figure, axes = pyplot.subplots(3, 3, figsize=(10, 8), constrained_layout=True)
    for axis, curve in zip(axes.flat, figures["curves"], strict=False):
        plot(axis, curve)
    axes.flat[0].legend(fontsize=7)
    plot_memory(axes.flat[-1], figures["curves"])
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("growth"), help="name of the files without their ending")
    parser.add_argument("--width", choices=tuple(WIDTHS), default="middle")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--longest", type=int, default=8192, help="leave out points above this")
    parser.add_argument("--drawn-from", type=Path, metavar="FILE", help="figures to draw instead of measuring")
    args = parser.parse_args(arguments)
    need_at_least(1, parser, args, "repeats")
    need_output(parser, "output", *(args.output.with_suffix(ending) for ending in (".json", ".png")))
    if args.drawn_from:
        figures = json.loads(args.drawn_from.read_text())
    else:
        torch.manual_seed(0)
        model = BagelForConditionalGeneration(make_config(args.width)).eval()
        rates = measured_rates(2 * args.repeats)
        figures = machine(None) | {"width": args.width, "rates": asdict(rates), "curves": []}
        for curve in curves():
            points = tuple(value for value in curve.points if value <= args.longest)
            shorter = Curve(curve.name, curve.along, points, curve.make, curve.with_memory)
            figures["curves"].append(measure(shorter, model, rates, args.repeats))
        args.output.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{rates_line(figures['rates'])}\n{agreement(figures)}\n\n{table(figures)}")
    draw(figures, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
