# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What it costs to watch a training's loss and gradients, and to look at decoded pixels: `python benchmarks/watch.py`.

Steps of the training scripts' loop, and the same steps without a look at what is finite, take turns in one process on the
same batch. The ratio is the median of those of the pairs. On a CPU the time is the process's own, which others on the machine
lengthen less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from models import WIDTHS, make_pipeline
from PIL import Image
from refusals import need_at_least
from timing import default_device, median_and_spread, synchronize

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelDataCollator
from transformers_bagel.training.losses import loss_totals


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from bagel_training.loop import Training  # noqa: E402  # the scripts are no package


def make_training(width: str, device: torch.device) -> tuple[Training, Any]:
    """A training of a model of random weights, and a batch of a drawing and a question."""
    pipe = make_pipeline(width, torch.float32, device)
    image = Image.new("RGB", (256, 256), "red")
    text = {"type": "text", "text": "a red square"}
    samples = [
        {"segments": [text, {"type": "vae_image", "image": image, "loss": True}]},
        {"segments": [{"type": "vit_image", "image": image}, text | {"loss": True}]},
    ]
    collator = BagelDataCollator(
        pipe.processor, vae=pipe.vae, generator=torch.Generator().manual_seed(0), return_layout=True
    )
    accelerator = Accelerator(cpu=device.type == "cpu")
    model = accelerator.prepare(pipe.transformer.train())
    # A rate of zero keeps the steps alike.
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=0.0))
    args: Any = SimpleNamespace(
        output_dir=".", max_nonfinite_steps=10, loss_reduction="token", max_grad_norm=1.0, sdpa_backend=None
    )
    unused: Any = None
    training = Training(args, accelerator, model, optimizer, unused, unused, unused, "")
    training.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
    return training, collator(samples).to(device)


def unwatched(training: Training, batch: Any) -> None:
    """A step that reads its metrics, as any training does, and never asks whether they are finite."""
    accelerator, optimizer = training.accelerator, training.optimizer
    totals = accelerator.reduce(loss_totals(batch, "token"), "sum")
    sums = torch.zeros(3, device=accelerator.device)
    with accelerator.autocast():
        outputs = training.model(**batch, loss_totals=totals)
        accelerator.backward(outputs.loss)
    sums += torch.stack([outputs.loss, outputs.ce_loss, outputs.mse_loss]).detach()
    float(torch.nn.utils.clip_grad_norm_(list(training.model.parameters()), 1.0))
    optimizer.step()
    training.scheduler.step()
    optimizer.zero_grad()
    accelerator.reduce(sums, "mean").tolist()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    run()
    synchronize(device)
    return clock() - start


def decoding_and_check(pipe: BagelPipeline, repeats: int) -> tuple[float, float]:
    """Seconds of a decode of 256 px, and of the look at whether its pixels are finite."""
    device, side = pipe.vae.device, 256 // pipe.vae_scale_factor
    grid = (side, side)
    latents = torch.randn(1, side * side, pipe.latent_dim, device=device)
    pixels = pipe.decode_latents(latents, grid, "pt")
    decode = statistics.median(
        seconds(lambda: pipe.decode_latents(latents, grid, "pt"), device) for _ in range(repeats)
    )
    return decode, statistics.median(seconds(lambda: bool(pixels.isfinite().all()), device) for _ in range(50))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", choices=tuple(WIDTHS), default=["golden", "middle"])
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args(arguments)
    need_at_least(1, parser, args, "repeats")
    device = default_device()
    print("| VAE | decode of 256 px | look at its pixels | share |\n|---|---|---|---|")
    for width in args.widths:
        decode, check = decoding_and_check(make_pipeline(width, torch.float32, device), args.repeats)
        print(f"| {width} | {1e3 * decode:.2f} ms | {1e3 * check:.3f} ms | {check / decode:.4f} |", flush=True)
    print("\n| width | watched | unwatched | spread | ratio |\n|---|---|---|---|---|")
    for width in args.widths:
        training, batch = make_training(width, device)

        def watched(training: Training = training, batch: Any = batch) -> None:
            training.is_good(1, training.update([batch]), [], 0.0)

        def plain(training: Training = training, batch: Any = batch) -> None:
            unwatched(training, batch)

        # The first pair warms up.
        pairs = [(seconds(watched, device), seconds(plain, device)) for _ in range(args.repeats + 1)][1:]
        ratio = statistics.median(own / other for own, other in pairs)
        (own, _), (other, spread) = map(median_and_spread, zip(*pairs, strict=True))
        print(
            f"| {width} | {1e3 * own:.2f} ms | {1e3 * other:.2f} ms | {1e3 * spread:.2f} ms | {ratio:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
