# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A denoising step by one process and by all: `torchrun --nproc-per-node 2 benchmarks/split.py`.

Random weights of the middle width, float32, on CPUs (gloo), one thread a process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import torch
from growth import PROMPT, grid_of, random_ids
from models import WIDTHS, make_config
from refusals import need_at_least
from timing import default_device, seconds_of
from torch import distributed
from transformers.distributed import DistributedConfig

from transformers_bagel import BagelForConditionalGeneration, PrefixCache, SplitPrefixCache


@torch.no_grad()
def denoise(model: BagelForConditionalGeneration, latents: int, splits: bool = False) -> Callable[[], torch.Tensor]:
    """A step behind a prompt, of which this process computes its part of the latents, if `splits`."""
    torch.manual_seed(0)
    filled = model(input_ids=random_ids(1, PROMPT), use_cache=True, logits_to_keep=1).past_key_values
    cache = PrefixCache.from_cache(filled, scratch=latents + 2)
    if splits:
        cache = SplitPrefixCache(cache.views, [latents], distributed.group.WORLD)
    inputs = {
        "latents": torch.randn(latents, model.config.latent_dim),
        "latent_grid_hw": torch.tensor([grid_of(latents)]),
        "timesteps": torch.tensor([0.5]),
        "position_ids": torch.tensor([PROMPT]),
        "past_key_values": cache,
    }
    return torch.no_grad()(lambda: model(**inputs).velocity)


def fastest(call: Callable[[], torch.Tensor], repeats: int) -> float:
    """Seconds of the fastest call, of the slowest process."""
    distributed.barrier()
    seconds = torch.tensor(min(seconds_of((call,), repeats, default_device())[0]))
    distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
    return float(seconds)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=tuple(WIDTHS), default="middle")
    parser.add_argument("--latents", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    need_at_least(1, parser, args, "latents", "repeats")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    whole = BagelForConditionalGeneration(make_config(args.width)).eval()
    # A new model draws nothing.
    torch.nn.init.normal_(whole.model.llm2vae.weight, std=0.02)
    with tempfile.TemporaryDirectory() as own:
        # The library saves in the first process alone.
        folders = [own]
        distributed.broadcast_object_list(folders)
        whole.save_pretrained(folders[0])
        distributed.barrier()
        part = BagelForConditionalGeneration.from_pretrained(
            folders[0], dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
        )
        distributed.barrier()
    rows = ["| latent tokens | one process | context split | speed-up | tensor parallel | speed-up | error |"]
    rows.append("|---|---|---|---|---|---|---|")
    for latents in args.latents:
        runs = [denoise(whole, latents), denoise(whole, latents, splits=True), denoise(part, latents)]
        expected, *found = (run() for run in runs)
        error = max(float((velocity - expected).abs().max()) for velocity in found)
        # All processes do the first by themselves, at the same time.
        one, split, parallel = (fastest(run, args.repeats) for run in runs)
        cells = [f"{latents:,}", f"{1000 * one:.0f} ms", f"{1000 * split:.0f} ms", f"{one / split:.2f}"]
        cells += [f"{1000 * parallel:.0f} ms", f"{one / parallel:.2f}", f"{error:.0e}"]
        rows.append(f"| {' | '.join(cells)} |")
    if distributed.get_rank() == 0:
        print("\n".join(rows))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
