# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Time a packed training step against the bare matrix products and attention at the same shapes.

    python benchmarks/training_step.py --json training_step.json

The row holds a drawing of 1,024 latent tokens, an edit of 256, and a question about an image. Each step is forward,
backward and AdamW; the floor is the products of every linear layer, forward and backward, and every attention, in the
same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from diffusers_bagel.published import load_published_vae
from transformers_bagel import BagelConfig, BagelDataCollator, BagelForConditionalGeneration, BagelProcessor


CHECKPOINT = Path(__file__).parents[1] / "tests" / "golden" / "a" / "checkpoint"
SIZES: dict[str, dict[str, Any]] = {
    "golden": {"text_config": {}, "vision_config": {"image_size": 224}},
    "middle": {
        "text_config": {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 1408,
            "vocab_size": 4096,
        },
        "vision_config": {
            "hidden_size": 288,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "intermediate_size": 1152,
            "image_size": 224,
        },
    },
}


def make_model(size: str) -> BagelForConditionalGeneration:
    """A model of random weights."""
    config = BagelConfig.from_pretrained(CHECKPOINT).to_dict()
    for name, changes in SIZES[size].items():
        config[name] |= changes
        config[name].pop("layer_types", None)
    torch.manual_seed(0)
    return BagelForConditionalGeneration(
        BagelConfig.from_dict(config | {"max_latent_size": 64, "vit_max_num_patch_per_side": 16})
    )


def make_batch() -> dict[str, torch.Tensor]:
    """One packed row."""
    processor = BagelProcessor.from_pretrained(
        CHECKPOINT,
        size={"shortest_edge": 224, "longest_edge": 224},
        vae_size={"shortest_edge": 256, "longest_edge": 512},
    )

    def part(value: str | int) -> dict[str, Any]:
        if isinstance(value, str):
            return {"type": "text", "text": value}
        return {"type": "image", "image": Image.effect_noise((value, value), 64)}

    def sample(question: list, answer: list) -> dict[str, Any]:
        turns = (("user", question), ("assistant", answer))
        return {"messages": [{"role": role, "content": [part(item) for item in parts]} for role, parts in turns]}

    text = "a red circle left of a large blue square on a yellow ground, " * 4
    samples = [sample([text], [512]), sample([256, "make it green"], [256]), sample([256, text], [text * 2])]
    generator = torch.Generator().manual_seed(0)
    vae = load_published_vae(CHECKPOINT)
    collator = BagelDataCollator(
        processor, vae=vae, text_dropout=0.0, vit_dropout=0.0, vae_dropout=0.0, generator=generator
    )
    return dict(collator(samples))


@contextmanager
def recorded(model: nn.Module, products: list, attentions: list) -> Iterator[None]:
    """Note the shapes of every product and attention of a forward."""
    hooks = [
        module.register_forward_hook(lambda module, args, output: products.append((args[0], module.weight)))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    attend = functional.scaled_dot_product_attention

    def noting(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attentions.append((query, key, value, kwargs))
        return attend(query, key, value, **kwargs)

    functional.scaled_dot_product_attention = noting  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attend
        for hook in hooks:
            hook.remove()


def floor_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """The products and attentions of a step, and nothing else."""
    products: list = []
    attentions: list = []
    with recorded(model, products, attentions):
        model(**batch)
    shapes = [(values.detach().flatten(0, -2), weight.detach()) for values, weight in products]
    inputs = [(values, weight, values @ weight.T) for values, weight in shapes if len(values)]
    leaves = [
        ([states.detach().requires_grad_() for states in (query, key, value)], kwargs)
        for query, key, value, kwargs in attentions
    ]

    def run() -> None:
        for values, weight, output in inputs:
            torch.mm(values, weight.T)
            torch.mm(output, weight)
            torch.mm(output.T, values)
        for states, kwargs in leaves:
            functional.scaled_dot_product_attention(*states, **kwargs).sum().backward()

    return run


def median_seconds(run: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median and spread (highest less lowest) of the repeats, after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), max(seconds) - min(seconds)


def measure(size: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of the table for one model size; checkpointing first, since the peak of memory only grows."""
    batch = make_batch()
    tokens = batch["input_ids"].numel()
    rows = []
    for checkpointing in (True, False):
        model = make_model(size).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters())

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds, spread = median_seconds(step, repeats)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        floor, _ = median_seconds(floor_of(model, batch), repeats)
        rows.append(
            {
                "size": size,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "tokens": tokens,
                "checkpointing": checkpointing,
                "seconds": seconds,
                "spread": spread,
                "tokens_per_second": tokens / seconds,
                "floor_seconds": floor,
                "ratio": seconds / floor,
                "peak_bytes": peak,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    rows = [row for size in args.sizes for row in measure(size, args.repeats)]
    print("| size | parameters | tokens | checkpointing | step | tokens/s | floor | step / floor | peak memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['size']} | {row['parameters'] / 1e6:.2f} M | {row['tokens']} | "
            f"{'on' if row['checkpointing'] else 'off'} | {row['seconds']:.3f} s ± {row['spread'] / 2:.3f} | "
            f"{row['tokens_per_second']:.0f} | {row['floor_seconds']:.3f} s | {row['ratio']:.2f} | "
            f"{row['peak_bytes'] / 2**30:.2f} GiB |"
        )
    if args.json:
        machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        Path(args.json).write_text(json.dumps(machine | {"rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
