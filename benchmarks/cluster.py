# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What 8 and 64 GPUs would give, by the vendors' figures and the cost model: `python benchmarks/cluster.py`.

Estimates: no GPU was there. `ASSUMPTIONS` says what share of the vendors' figures is taken to be reached; communication is
counted, and taken to overlap with nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import cost
import torch
from cost import Cost, Rates
from models import published_vae
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transformers_bagel import BagelConfig, BagelForConditionalGeneration


# Of bfloat16.
ITEMSIZE = 2
NODE = 8
GPUS = (8, 64)


@dataclass(frozen=True)
class Accelerator:
    """
    A vendor's figures.

    Attributes:
        name (`str`)
        peak (`float`): Operations a second in bfloat16, without sparsity.
        bandwidth (`float`): Bytes a second from its memory.
        link (`float`): Bytes a second to the other GPUs of its node, in one direction: half of the vendor's figure.
        network (`float`): Bytes a second to other nodes, in one direction.
    """

    name: str
    peak: float
    bandwidth: float
    link: float
    network: float


# NVIDIA, "H100 Tensor Core GPU" datasheet (SXM): 1,979 TFLOPS with sparsity, 3.35 TB/s, NVLink 900 GB/s;
# "DGX H100" datasheet: 8 GPUs, 8 ConnectX-7 at 400 Gb/s for them.
H100 = Accelerator("H100 SXM", 989.5e12, 3.35e12, 450e9, 50e9)
# NVIDIA, "A100 Tensor Core GPU" datasheet (80 GB SXM): 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s;
# "DGX A100" datasheet: 8 GPUs, 8 ConnectX-6 at 200 Gb/s for them.
A100 = Accelerator("A100 SXM 80 GB", 312e12, 2.039e12, 300e9, 25e9)


@dataclass(frozen=True)
class Assumptions:
    """Shares of the vendors' figures that are reached, and seconds that a collective takes at least."""

    products: float = 0.5
    attention: float = 0.4
    bandwidth: float = 0.7
    link: float = 0.7
    latency_in_a_node: float = 20e-6
    latency_between_nodes: float = 60e-6


ASSUMPTIONS = Assumptions()
# A prompt of a sentence or two, and the two views of a picture of 1024 px with their markers, as the original
# image sizes make them.
PROMPT = 32
LATENTS = 64**2
PATCHES = 70**2
STEPS = 49
# Of the presets (original behaviour, point 20): one forward a step, and those of guidance.
DRAWING_FORWARDS = 90
TRAINING_SAMPLES = 4


def rates(accelerator: Accelerator) -> Rates:
    """What a GPU is taken to reach."""
    peak, shares = accelerator.peak, ASSUMPTIONS
    return Rates(shares.products * peak, shares.attention * peak, shares.bandwidth * accelerator.bandwidth)


def gather_seconds(size: float, gpus: int, accelerator: Accelerator) -> float:
    """
    Seconds of an all-gather, or of a reduce-scatter: half of an all-reduce.

    Args:
        size (`float`): Bytes that every GPU has at the end.
        gpus (`int`): GPUs; those of a node first. Between nodes, rings go through all network cards of a node.
        accelerator (`Accelerator`)
    """
    if gpus == 1:
        return 0.0
    link, latency = accelerator.link, ASSUMPTIONS.latency_in_a_node
    if gpus > NODE:
        link, latency = min(link, NODE * accelerator.network), ASSUMPTIONS.latency_between_nodes
    return (gpus - 1) / gpus * size / (ASSUMPTIONS.link * link) + latency


def tensor_parallel_seconds(config: BagelConfig, tokens: Sequence[int], gpus: int, accelerator: Accelerator) -> float:
    """Communication of a pass: in each layer every expert's tokens are summed over the GPUs twice."""
    text = config.get_text_config()
    sizes = [count * text.hidden_size * ITEMSIZE for count in tokens]
    return 2 * text.num_hidden_layers * sum(2 * gather_seconds(size, gpus, accelerator) for size in sizes)


def context_split_seconds(config: BagelConfig, latents: Sequence[int], gpus: int, accelerator: Accelerator) -> float:
    """Communication of a denoising step: in each layer the keys and values of each block, and at the end its states."""
    text = config.get_text_config()
    layers, token = text.num_hidden_layers, cost.cache_bytes_per_token(config, ITEMSIZE)
    return sum(
        layers * gather_seconds(count * token / layers, gpus, accelerator)
        + gather_seconds(count * text.hidden_size * ITEMSIZE, gpus, accelerator)
        for count in latents
    )


@dataclass(frozen=True)
class Task:
    """
    A picture of 1024 px.

    Attributes:
        steps (`tuple[tuple[int, tuple[int, ...]], ...]`): How many steps, and the prefix of each of their branches.
        before (`Cost`): Contexts and VAE, which every GPU of the picture computes.
    """

    steps: tuple[tuple[int, tuple[int, ...]], ...]
    before: Cost


def tasks(config: BagelConfig) -> dict[str, Task]:
    """Text to image, and editing one picture, both by the preset."""
    drawing = cost.prefill(config, PROMPT, cost.causal_pairs(PROMPT), ITEMSIZE)
    guided = DRAWING_FORWARDS - STEPS
    latents, patches = LATENTS + 2, PATCHES + 2
    seen = latents + patches
    pairs = latents**2 + patches * seen + cost.causal_pairs(PROMPT, seen)
    editing = cost.prefill(config, seen + PROMPT, pairs, ITEMSIZE) + drawing + cost.vision(config, PATCHES)
    decoded, encoded = vae_operations()
    return {
        "text to image": Task(((guided, (PROMPT, 0)), (STEPS - guided, (PROMPT,))), drawing + Cost(decoded)),
        "edit": Task(((STEPS, (seen + PROMPT, seen, PROMPT)),), editing + Cost(decoded + encoded)),
    }


@cache
def vae_operations(pixels: int = 1024) -> tuple[int, int]:
    """Operations of decoding and of encoding with BAGEL's VAE, counted at its shapes."""
    with torch.device("meta"):
        vae = published_vae()
        runs: tuple[Callable[[], object], ...] = (
            lambda: vae.decode(torch.empty(1, 16, pixels // 8, pixels // 8)),
            lambda: vae.encode(torch.empty(1, 3, pixels, pixels)),
        )
        counts = []
        for run in runs:
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
                run()
            counts.append(counter.get_total_flops())
    return counts[0], counts[1]


def alone(config: BagelConfig, prefixes: Sequence[int], accelerator: Accelerator) -> float:
    """Seconds of a step on one GPU."""
    return cost.seconds(cost.denoise(config, [LATENTS] * len(prefixes), prefixes, ITEMSIZE), rates(accelerator))


def by_branches(config: BagelConfig, prefixes: Sequence[int], accelerator: Accelerator) -> float:
    """Seconds of a step whose branches are computed by one GPU each: the longest, and the gathering of the velocities."""
    longest = max(alone(config, [prefix], accelerator) for prefix in prefixes)
    return longest + gather_seconds(len(prefixes) * LATENTS * config.latent_dim * 4, len(prefixes), accelerator)


def tensor_parallel(gpus: int) -> Callable[[BagelConfig, Sequence[int], Accelerator], float]:
    """Seconds of a step whose layers are split over several GPUs."""

    def step(config: BagelConfig, prefixes: Sequence[int], accelerator: Accelerator) -> float:
        whole = cost.denoise(config, [LATENTS] * len(prefixes), prefixes, ITEMSIZE)
        tokens = (2 * len(prefixes), LATENTS * len(prefixes))
        computed = cost.seconds(whole.times(1 / gpus), rates(accelerator))
        return computed + tensor_parallel_seconds(config, tokens, gpus, accelerator)

    return step


def context_split(gpus: int) -> Callable[[BagelConfig, Sequence[int], Accelerator], float]:
    """Seconds of a step whose latents are split over several GPUs."""

    def step(config: BagelConfig, prefixes: Sequence[int], accelerator: Accelerator) -> float:
        whole = cost.denoise(config, [LATENTS] * len(prefixes), prefixes, ITEMSIZE)
        # Every GPU reads all weights, and the whole prefix.
        part = replace(whole, products=whole.products / gpus, attention=whole.attention / gpus)
        computed = cost.seconds(part, rates(accelerator))
        return computed + context_split_seconds(config, [LATENTS] * len(prefixes), gpus, accelerator)

    return step


WAYS: dict[str, tuple[dict[str, int], Callable[[BagelConfig, Sequence[int], Accelerator], float]]] = {
    "a picture a GPU": ({"text to image": 1, "edit": 1}, alone),
    "a branch a GPU": ({"text to image": 2, "edit": 3}, by_branches),
    "tensor parallel": ({"text to image": 4, "edit": 4}, tensor_parallel(4)),
    "context split, a node": ({"text to image": 8, "edit": 8}, context_split(8)),
    "context split, 8 nodes": ({"text to image": 64, "edit": 64}, context_split(64)),
}


def picture_seconds(
    config: BagelConfig,
    task: Task,
    step: Callable[[BagelConfig, Sequence[int], Accelerator], float],
    accelerator: Accelerator,
) -> float:
    """Seconds of a picture. What comes before its steps, and the VAE, is not split in any of the ways."""
    before = cost.seconds(task.before, rates(accelerator))
    return before + sum(count * step(config, prefixes, accelerator) for count, prefixes in task.steps)


def pictures_table(config: BagelConfig, accelerator: Accelerator) -> str:
    lines = [
        f"| {accelerator.name} | task | GPUs a picture | seconds | speed-up | of the ideal | pictures a minute, 8 GPUs | 64 GPUs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, task in tasks(config).items():
        one = picture_seconds(config, task, alone, accelerator)
        for way, (sizes, step) in WAYS.items():
            gpus, seconds = sizes[name], picture_seconds(config, task, step, accelerator)
            rate = [f"{count // gpus * 60 / seconds:,.0f}" if count >= gpus else "–" for count in GPUS]
            ideal = f"{100 * one / seconds / gpus:.0f} %"
            cells = [way, name, f"{gpus}", f"{seconds:.2f}", f"{one / seconds:.1f}", ideal, *rate]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def decoding_table(config: BagelConfig, accelerator: Accelerator) -> str:
    text = config.get_text_config()
    lines = [f"| {accelerator.name} | samples | prefix | ms a step | tokens/s |", "|---|---|---|---|---|"]
    for gpus in (1, text.num_key_value_heads):
        for batch, prefix in ((1, 1024), (1, 8192), (64, 1024), (64, 8192)):
            whole = cost.decode(config, prefix, batch, ITEMSIZE)
            seconds = cost.seconds(whole.times(1 / gpus), rates(accelerator))
            seconds += tensor_parallel_seconds(config, (batch,), gpus, accelerator) if gpus > 1 else 0.0
            way = "one GPU" if gpus == 1 else f"tensor parallel, {gpus}"
            lines.append(f"| {way} | {batch} | {prefix:,} | {1000 * seconds:.1f} | {batch / seconds:,.0f} |")
    return "\n".join(lines)


def training_table(config: BagelConfig, accelerator: Accelerator) -> str:
    """Sharded training (FSDP2) of packed drawings of 1024 px, one sequence a GPU."""
    sample = PROMPT + 2 + LATENTS
    texts, tokens = TRAINING_SAMPLES * (PROMPT + 2), TRAINING_SAMPLES * sample
    pairs = TRAINING_SAMPLES * sample**2
    row = cost.training(config, texts, TRAINING_SAMPLES * LATENTS, TRAINING_SAMPLES * PROMPT, pairs)
    # Checkpointing computes the forward twice.
    row = Cost(row.products * 4 / 3, row.attention * (1 + 1 / 3.5))
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in BagelForConditionalGeneration(config).parameters())
    lines = [
        f"| {accelerator.name} | GB a GPU: weights, gradients, AdamW | s a step | of which communication | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for gpus in GPUS:
        # Gathered in bfloat16 for the forward and for the backward; gradients are summed in float32.
        moved = 2 * gather_seconds(2 * weights, gpus, accelerator) + gather_seconds(4 * weights, gpus, accelerator)
        seconds = cost.seconds(row, rates(accelerator)) + moved
        held = 16 * weights / gpus / 1e9
        cells = [f"{gpus} GPUs", f"{held:.1f}", f"{seconds:.2f}", f"{100 * moved / seconds:.0f} %"]
        lines.append(f"| {' | '.join([*cells, f'{gpus * tokens / seconds:,.0f}'])} |")
    return "\n".join(lines)


def tables(config: BagelConfig) -> list[str]:
    """The tables of benchmarks/results/gpus.md."""
    return [
        facts_table(config),
        pictures_table(config, H100),
        pictures_table(config, A100),
        decoding_table(config, H100),
        training_table(config, H100),
    ]


def facts_table(config: BagelConfig) -> str:
    """What follows from the configuration alone, or with the figures of one GPU."""
    drawing = cost.denoise(config, [LATENTS], [PROMPT], ITEMSIZE)
    ((_, prefixes),) = tasks(config)["edit"].steps
    editing = cost.denoise(config, [LATENTS] * len(prefixes), prefixes, ITEMSIZE)
    text = config.get_text_config()
    token = cost.cache_bytes_per_token(config, ITEMSIZE)
    decoded, encoded = vae_operations()
    facts = {
        "operations of a forward of 4,096 latents": f"{drawing.operations / 1e12:.1f} TFLOP",
        "attention of such a forward": f"{100 * drawing.attention / drawing.operations:.0f} %",
        "operations of an editing step, three branches": f"{editing.operations / 1e12:.0f} TFLOP",
        "attention of an editing step": f"{100 * editing.attention / editing.operations:.0f} %",
        "keys at which attention equals the linear layers": f"{cost.tokens_of_equal_cost(config):,.0f}",
        "VAE at 1024 px, decoding and encoding": f"{decoded / 1e12:.1f} and {encoded / 1e12:.1f} TFLOP",
        "weights that a decoding step reads": f"{cost.decode(config, 0, 1, ITEMSIZE).weight_bytes / 1e9:.1f} GB",
        "keys and values of a token, all layers": f"{token / 1024:.0f} KiB",
        "samples at which an H100 decodes as long as it reads weights": f"{rates(H100).products / rates(H100).bandwidth:.0f}",
        "moved a layer and block of 4,096 latents: context split": f"{LATENTS * token / text.num_hidden_layers / 1e6:.1f} MB",
        "the same: tensor parallel": f"{2 * 2 * LATENTS * text.hidden_size * ITEMSIZE / 1e6:.0f} MB",
    }
    return "\n".join(
        ["| BAGEL-7B-MoT in bfloat16 | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items())]
    )


def main() -> None:
    config = BagelConfig()
    print("\n\n".join(tables(config)))


if __name__ == "__main__":
    main()
