# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a way of loading saves, and what it costs: size of the weights, peak memory, time of a step, error of the velocities.

    python benchmarks/memory.py --json memory.json

Each way is measured in a process of its own, on a bfloat16 checkpoint of random weights. Its memory is the peak resident
size (VmHWM of Linux) above what the imports take, of loading the transformer and then of drawing; glibc is told to give
back what was freed. The errors are those of the velocities of the golden checkpoint, each from the golden latents of its
step, against the original code in float32. The size of the original weights is calculated from their shapes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import make_config
from PIL import Image
from refusals import need_at_least, need_output
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, TorchAoConfig

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.quantization import undivided_modules


GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "a"
CHECKPOINT = GOLDEN / "checkpoint"


@dataclass(frozen=True)
class Way:
    """A way of loading: arguments of the model's `from_pretrained`, whether its layers rest in float8, and the bytes that a
    weight of a rounded layer takes, if there are such."""

    dtype: torch.dtype = torch.bfloat16
    quantization: Callable[[], Any] | None = None
    modules: tuple[tuple[str, bool], ...] = ()
    casts: bool = False
    layer_bytes: float | None = None

    def load(self, folder: Path) -> BagelForConditionalGeneration:
        quantization = {} if self.quantization is None else {"quantization_config": self.quantization()}
        return BagelForConditionalGeneration.from_pretrained(
            folder, dtype=self.dtype, **quantization, **dict(self.modules)
        )

    def pipeline(self, folder: Path, transformer: BagelForConditionalGeneration, **sizes: Any) -> BagelPipeline:
        processor = BagelProcessor.from_pretrained(folder, **sizes)
        pipe = BagelPipeline.from_pretrained(folder, transformer=transformer, processor=processor)
        pipe.set_progress_bar_config(disable=True)
        if self.casts:
            pipe.enable_layerwise_casting()
        return pipe


def torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


WAYS = {
    "float32": Way(torch.float32),
    "bfloat16": Way(),
    "torchao int8": Way(quantization=torchao_int8, layer_bytes=1),
    "bitsandbytes int8": Way(quantization=lambda: BitsAndBytesConfig(load_in_8bit=True), layer_bytes=1),
    # Half a byte, and four of scale for each block of 64.
    "bitsandbytes nf4": Way(
        quantization=lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), layer_bytes=0.5 + 4 / 64
    ),
    "float8 layers, cast": Way(casts=True, layer_bytes=1),
    "understanding only": Way(modules=(("visual_gen", False),)),
    "generation only": Way(modules=(("visual_und", False),)),
}


def middle_config() -> BagelConfig:
    # Small tables of positions: a picture here has few patches.
    return make_config("middle", image_size=224, patches_per_side=16)


def weight_bytes(config: BagelConfig, way: Way) -> float:
    """What the weights of a model take, by their shapes."""
    config = copy.deepcopy(config)
    for name, value in way.modules:
        setattr(config, name, value)
    with torch.device("meta"):
        model = BagelForConditionalGeneration(config)
    in_four_bits = getattr(way.quantization and way.quantization(), "load_in_4bit", False)
    kept = undivided_modules(model, 32, 64) if in_four_bits else []

    def size(name: str) -> float:
        module, _, parameter = name.rpartition(".")
        rounded = ".layers." in name and "norm" not in name and parameter == "weight" and re.escape(module) not in kept
        return way.layer_bytes if way.layer_bytes and rounded else way.dtype.itemsize

    return sum(size(name) * tensor.numel() for name, tensor in model.state_dict().items())


def save_checkpoint(folder: Path) -> None:
    """A model of random weights in the original layout, with the golden VAE and tokenizer."""
    torch.manual_seed(0)
    BagelForConditionalGeneration(middle_config()).to(torch.bfloat16).save_pretrained(folder)
    for name in ("ae.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder)


def reset_peak() -> int:
    """Forget the peak of this process's memory, and return what it takes now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def size_on_disk(model: BagelForConditionalGeneration) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def draw(pipe: BagelPipeline, steps: int) -> float:
    """Median seconds of a step of 256 tokens in two contexts, after one to warm up."""
    moments: list[float] = []

    def note(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        moments.append(time.perf_counter())
        return tensors

    pipe(
        "a red circle left of a large blue square",
        height=256,
        width=256,
        num_inference_steps=steps + 2,
        cfg_interval=(0.0, 1.0),
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=note,
    )
    return statistics.median(after - before for before, after in zip(moments[1:-1], moments[2:], strict=True))


def golden_errors(way: Way) -> tuple[float, float]:
    """Largest error, and error relative to their length, of the golden velocities that follow from no plan."""
    cases = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
    golden = load_file(GOLDEN / "golden.safetensors")
    sizes = {
        name: {"longest_edge": cases[edges][0], "shortest_edge": cases[edges][1]}
        for name, edges in (("size", "vit_transform"), ("vae_size", "vae_transform"))
    }
    pipe = way.pipeline(CHECKPOINT, way.load(CHECKPOINT), **sizes)
    errors, lengths = [], []
    for case in cases["image"]:
        if case.get("think") or case["params"].get("enable_taylorseer"):
            continue
        expected = golden[f"{case['key']}.velocity"]
        actual = velocities_along(pipe, case, golden[f"{case['key']}.noise"], expected)
        errors.append((actual - expected).flatten())
        lengths.append(expected.flatten())
    error, length = torch.cat(errors), torch.cat(lengths)
    return error.abs().max().item(), (error.norm() / length.norm()).item()


def velocities_along(pipe: BagelPipeline, case: dict, noise: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Velocities of a golden case, `(steps, tokens, latent_dim)`, each computed at the latents that the golden ones lead to."""
    params = case["params"]
    pipe.scheduler.set_shift(params["timestep_shift"])
    latents = noise
    velocities = []

    def compare(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        nonlocal latents
        interval = pipeline.scheduler.sigmas[step + 1] - pipeline.scheduler.sigmas[step]
        velocities.append((tensors["latents"][0] - latents) / interval)
        latents = latents + interval * expected[step]
        return {"latents": latents.unsqueeze(0)}

    pipe(
        prompt=next(item for item in case["inputs"] if not item.startswith("@")),
        image=[Image.open(GOLDEN / "inputs" / f"{item[1:]}.png") for item in case["inputs"] if item.startswith("@")]
        or None,
        height=case["shape"][0],
        width=case["shape"][1],
        num_inference_steps=params["num_timesteps"] - 1,
        guidance_scale=params["cfg_text_scale"],
        image_guidance_scale=params["cfg_img_scale"],
        cfg_interval=tuple(params["cfg_interval"]),
        cfg_renorm_type=params["cfg_renorm_type"],
        cfg_renorm_min=params["cfg_renorm_min"],
        vae_sample_mode="argmax",
        latents=noise.unsqueeze(0),
        output_type="latent",
        callback_on_step_end=compare,
    )
    return torch.stack(velocities)


def measure(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """The row of one way, in this process."""
    way = WAYS[name]
    row: dict[str, Any] = {"name": name, "original_bytes": weight_bytes(BagelConfig(), way)}
    before = reset_peak()
    model = way.load(folder)
    row["load_bytes"] = peak() - before
    if not way.casts:
        row["disk_bytes"] = size_on_disk(model)
    if model.config.visual_gen:
        pipe = way.pipeline(folder, model)
        reset_peak()
        row["step_seconds"] = draw(pipe, steps)
        row["draw_bytes"] = peak() - before
    if not way.modules:
        row["max_error"], row["relative_error"] = golden_errors(way)
    return row


def measure_in_a_process(name: str, folder: Path, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", name, str(folder), "--steps", str(steps)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    columns: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("original weights", "original_bytes", lambda value: f"{value / 1e9:.1f} GB"),
        ("on disk", "disk_bytes", lambda value: f"{value / 2**20:.0f} MiB"),
        ("peak, loading", "load_bytes", lambda value: f"{value / 2**20:.0f} MiB"),
        ("peak, drawing", "draw_bytes", lambda value: f"{value / 2**20:.0f} MiB"),
        ("step", "step_seconds", lambda value: f"{1000 * value:.0f} ms"),
        ("largest error", "max_error", lambda value: f"{value:.2g}"),
        ("relative error", "relative_error", lambda value: f"{value:.2g}"),
    )
    lines = [f"| | {' | '.join(title for title, _, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [show(row[key]) if key in row else "–" for _, key, show in columns]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int, default=9, help="timed denoising steps")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help="one way, in this process")
    args = parser.parse_args(arguments)
    need_at_least(1, parser, args, "steps")
    need_output(parser, "json", args.json)
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder))
        rows = [measure_in_a_process(name, Path(folder), args.steps) for name in args.ways]
    print(table(rows))
    if args.json:
        machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        args.json.write_text(json.dumps(machine | {"rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
