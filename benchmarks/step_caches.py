# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What step caches leave out, and what that costs.

    bash scripts/step_caches.sh --num 50 --json benchmarks/results/step_caches.json

On bagel-shapes, whose drawings and edits are judged, and at the middle width of random weights, where a forward takes long enough
to be timed. cache-dit is measured where it is installed: `scripts/step_caches.sh` sees to that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from models import make_pipeline
from refusals import need_at_least, need_output

from diffusers_bagel import BagelPipeline


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "shapes"))
from asking import DRAWING, EDITING, STEPS  # noqa: E402
from judge import draw_cases, edit_cases, is_drawn, is_edited  # noqa: E402
from parts import CHECKPOINT  # noqa: E402
from world import render  # noqa: E402


MIDDLE_STEPS = 49
# Pixels of a latent token.
SIDE_STEP = 16
TAYLOR = {"taylor_factors_dtype": torch.float32}
CONFIGS: dict[str, Any] = {
    "TaylorSeer 5, before 3, order 1": TaylorSeerCacheConfig(**TAYLOR),
    "TaylorSeer 3, before 5, order 1": TaylorSeerCacheConfig(3, 5, **TAYLOR),
    "FirstBlock 0.05": FirstBlockCacheConfig(0.05),
    "FirstBlock 0.1": FirstBlockCacheConfig(0.1),
    "FirstBlock 0.2": FirstBlockCacheConfig(0.2),
    "Sea 0.25": SeaCacheConfig(),
    "Sea 0.5": SeaCacheConfig(0.5),
}
MAG_THRESHOLDS = (0.06, 0.24)
CACHE_DIT_THRESHOLDS = (0.08, 0.16)


@dataclass
class Row:
    """
    Pictures of one means.

    Attributes:
        forwards (`float`): Of all layers and one branch, a picture.
        seconds, cpu_seconds (`float`): A picture, and what all threads took for it.
        latents (`float`), psnr (`float`, *optional*): Distance from the plain pictures, relative, and in decibels.
        score (`float`, *optional*): Share of pictures that are as they should be.
    """

    forwards: float
    seconds: float
    cpu_seconds: float
    latents: float
    psnr: float | None
    score: float | None


class Task:
    """
    Pictures that are drawn again and again.

    Args:
        pipe ([`BagelPipeline`])
        calls (`Sequence[dict]`): Arguments of the pipeline, of one picture each.
        judge (`Callable[[int, PIL.Image.Image], bool]`, *optional*): Whether a picture is as it should be.
    """

    def __init__(self, pipe: BagelPipeline, calls: Sequence[dict[str, Any]], judge: Callable | None = None):
        self.pipe, self.calls, self.judge = pipe, calls, judge
        self.plain: tuple[torch.Tensor, torch.Tensor] | None = None

    def row(self, forwards: float | None = None, **changes: Any) -> Row:
        """
        The pictures as the pipeline draws them now; the first ones are those that others are compared with.

        Args:
            forwards (`float`, *optional*): A picture, where layers are compiled and cannot be counted.
            changes: Of the arguments of the pipeline.
        """
        drawn, seen, start, cpu_start = [], [], time.perf_counter(), time.process_time()
        with counted(self.pipe) if forwards is None else nullcontext([forwards * len(self.calls)]) as computed:
            for seed, call in enumerate(self.calls):
                generator = torch.Generator().manual_seed(seed)
                latents = self.pipe(generator=generator, output_type="latent", **(call | changes)).images
                side = math.isqrt(latents.shape[1])
                drawn.append(latents)
                seen.append(self.pipe.decode_latents(latents, (side, side), "pt"))
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        latents, pictures = torch.cat(drawn), torch.cat(seen)
        self.plain = self.plain or (latents, pictures)
        error = float((latents - self.plain[0]).norm() / self.plain[0].norm())
        squared = float((pictures - self.plain[1]).square().mean())
        score = None
        if self.judge is not None:
            images = self.pipe.image_processor.postprocess(pictures, "pil", [False] * len(pictures))
            score = sum(map(self.judge, range(len(images)), images)) / len(images)
        count = len(pictures)
        psnr = -10 * math.log10(squared) if squared else None
        return Row(computed[0] / count, seconds / count, cpu_seconds / count, error, psnr, score)


@contextmanager
def counted(pipe: BagelPipeline) -> Iterator[list[float]]:
    """Forwards of all layers by one branch of one picture; fewer layers are a part of one."""
    layers = pipe.transformer.model.language_model.layers
    computed = [0.0]

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["routing"] is not None:
            computed[0] += len(list(kwargs["routing"].block_slices())) / len(layers)

    hooks = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield computed
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def cache(pipe: BagelPipeline, config: Any) -> Iterator[None]:
    """A step cache of diffusers."""
    pipe.enable_cache(config)
    try:
        yield
    finally:
        pipe.disable_cache()


@contextmanager
def taylorseer(pipe: BagelPipeline) -> Iterator[None]:
    """The published TaylorSeer."""
    pipe.enable_taylorseer()
    try:
        yield
    finally:
        pipe.disable_taylorseer()


@contextmanager
def cache_dit(pipe: BagelPipeline, threshold: float) -> Iterator[None]:
    """cache-dit's DBCache, with its own Taylor expansion of what is left out."""
    import cache_dit
    from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig

    layers = pipe.denoising_layers
    adapter = BlockAdapter(
        pipe=pipe,
        transformer=layers,
        blocks=[layers.full, layers.no_text, layers.no_image],
        forward_pattern=[ForwardPattern.Pattern_3] * 3,
    )
    config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=threshold)
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=TaylorSeerCalibratorConfig())
    try:
        yield
    finally:
        cache_dit.disable_cache(adapter)


def measured(pipe: BagelPipeline, tasks: dict[str, Task], steps: int) -> dict[str, dict[str, Any]]:
    """A row of each task for each means."""
    print(f"{'':32}" + "".join(f"   {name + ': forwards, s, CPU s, error, dB, right':>45}" for name in tasks))
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str) -> None:
        found = {task: one.row() for task, one in tasks.items()}
        rows[name] = {task: asdict(row) for task, row in found.items()}
        print(f"{name:32}" + "".join(f"   {cells(row):>45}" for row in found.values()), flush=True)

    # The first call makes what all share.
    pipe("a", num_inference_steps=1, output_type="latent")
    add("plain")
    with taylorseer(pipe):
        add("enable_taylorseer()")
    for name, config in CONFIGS.items():
        with cache(pipe, config):
            add(name)
    with cache(pipe, MagCacheConfig(calibrate=True, num_inference_steps=steps)):
        for call in next(iter(tasks.values())).calls[:4]:
            pipe(output_type="latent", **call)
    rows["mag_ratios"] = {str(steps): [round(ratio, 4) for ratio in pipe.mag_ratios]}
    for threshold in MAG_THRESHOLDS:
        with cache(pipe, MagCacheConfig(threshold, num_inference_steps=steps, mag_ratios=pipe.mag_ratios)):
            add(f"Mag {threshold}")
    if find_spec("cache_dit") is None:
        print("cache-dit is not installed, and left out.")
    for threshold in CACHE_DIT_THRESHOLDS if find_spec("cache_dit") else ():
        with cache_dit(pipe, threshold):
            add(f"cache-dit {threshold}")
    return rows


def cells(row: Row) -> str:
    """A row's numbers."""
    psnr = "–" if row.psnr is None else f"{row.psnr:.1f}"
    score = "–" if row.score is None else f"{row.score:.1%}"
    return f"{row.forwards:.1f} {row.seconds:.2f} {row.cpu_seconds:.2f} {row.latents:.4f} {psnr} {score}"


def shapes_tasks(num: int, steps: int) -> tuple[BagelPipeline, dict[str, Task]]:
    """Drawings and edits of bagel-shapes."""
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts, edits = draw_cases("draw_full", num, 0), edit_cases(num, 0)
    # One at a time: several would share forwards where nothing is left out.
    drawing = [{"prompt": case.prompt, "num_inference_steps": steps} | DRAWING for case in prompts]
    editing = [
        {"prompt": case.instruction, "image": render(case.scene), "num_inference_steps": steps} | EDITING
        for case in edits
    ]
    return pipe, {
        "drawing": Task(pipe, drawing, lambda index, picture: is_drawn(picture, prompts[index])),
        "edit": Task(pipe, editing, lambda index, picture: is_edited(picture, edits[index].target)),
    }


def shapes(num: int) -> dict[str, Any]:
    """Rows of bagel-shapes."""
    pipe, tasks = shapes_tasks(num, STEPS)
    return measured(pipe, tasks, STEPS)


def make_middle() -> BagelPipeline:
    """Of random weights."""
    pipe = make_pipeline("middle", torch.float32, torch.device("cpu"))
    # A new model draws nothing.
    torch.nn.init.normal_(pipe.transformer.model.llm2vae.weight, std=0.02)
    return pipe


def middle(side: int) -> dict[str, Any]:
    """A drawing at the middle width."""
    pipe = make_middle()
    call = {"prompt": "a red circle", "height": side, "width": side, "num_inference_steps": MIDDLE_STEPS}
    return measured(pipe, {"drawing": Task(pipe, [call])}, MIDDLE_STEPS)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be measured; the middle width comes last, behind minutes of bagel-shapes."""
    need_at_least(0, parser, args, "num", "side")
    need_output(parser, "json", args.json)
    if not args.num and not args.side:
        parser.error("--num and --side are both 0: there is nothing to do.")
    if args.side % SIDE_STEP:
        parser.error(f"--side must be a multiple of {SIDE_STEP}, got {args.side}.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=8, help="drawings, and edits, of bagel-shapes; 0 leaves them out")
    parser.add_argument(
        "--side", type=int, default=256, help="pixels of a picture at the middle width; 0 leaves it out"
    )
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    args = parser.parse_args(arguments)
    check(parser, args)
    tables: dict[str, Any] = {"num": args.num, "side": args.side, "threads": torch.get_num_threads()}
    if args.num:
        tables["shapes"] = shapes(args.num)
    if args.side:
        tables["middle"] = middle(args.side)
    if args.json:
        args.json.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
