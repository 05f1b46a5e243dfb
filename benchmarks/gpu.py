# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The 7B model's sizes with random weights in bfloat16, on one GPU of 80 GB: `python benchmarks/gpu.py`.

What it computes takes the time that it takes with the published weights, but for where a text ends; pictures are noise.
Each section prints its own rows, so that a run that is cut off has told what it could; `scripts/gpu_check.sh` runs some.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import INSTRUCTION, PROMPT, Work, denoise, picture, random_ids
from diffusers import FlowMatchEulerDiscreteScheduler
from lines import Lines
from machine import machine
from models import CHECKPOINT, IMAGE_SIZES, make_pipeline, published_vae, write_tokens
from peft import LoraConfig, get_peft_model_state_dict
from refusals import need_output
from timing import default_device, forget_peak, median_and_spread, peak_bytes, seconds_of, seconds_once


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from bagel_training.throughput import measured_peak  # noqa: E402
from training_step import TrainingStep, peak_flops  # noqa: E402

from diffusers_bagel import BagelPipeline, denoising  # noqa: E402
from diffusers_bagel.few_steps import FewSteps  # noqa: E402
from transformers_bagel import (  # noqa: E402
    LORA_TARGETS,
    BagelConfig,
    BagelForConditionalGeneration,
    BagelProcessor,
    fork_cache,
)


DTYPE = torch.bfloat16
FEW_STEPS = 6


@dataclass(frozen=True)
class Scale:
    """
    How large what is measured is.

    Attributes:
        pixels (`int`): Of a side of a picture.
        steps (`int`): Of a picture.
        read, written (`int`): Tokens.
        batch (`int`): Of texts.
        repeats (`int`): Of what is short.
    """

    pixels: int
    steps: int
    read: int
    written: int
    batch: int
    repeats: int


FULL = Scale(pixels=1024, steps=49, read=1024, written=64, batch=16, repeats=5)
# All the same in seconds on a CPU, with the tests' checkpoint in the place of the model.
SMALL = Scale(pixels=64, steps=8, read=16, written=4, batch=2, repeats=1)


def make_full_size(device: torch.device) -> BagelPipeline:
    """The pipeline of random weights, made where it stays; the tests' tokenizer, whose ids the configuration has."""
    ids = BagelConfig.from_pretrained(CHECKPOINT).to_dict()
    config = BagelConfig(**{name: value for name, value in ids.items() if name.endswith("_token_id")})
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    try:
        with device:
            transformer = BagelForConditionalGeneration(config).eval()
            vae = published_vae().eval()
    finally:
        torch.set_default_dtype(torch.float32)
    pipe = BagelPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        processor=BagelProcessor.from_pretrained(CHECKPOINT, **IMAGE_SIZES),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Figures:
    """
    Measures, prints and keeps rows. The public methods behind `timed` are the sections, of which later ones may change the model.

    Args:
        pipe ([`BagelPipeline`])
        scale ([`Scale`])
        device (`torch.device`)
        lines ([`Lines`]): Told each row.
    """

    def __init__(self, pipe: BagelPipeline, scale: Scale, device: torch.device, lines: Lines):
        self.pipe, self.scale, self.device, self.lines = pipe, scale, device, lines
        self.rows: list[dict[str, Any]] = []
        self.section = ""
        # A CPU's compiler would take minutes.
        self.backend = "eager" if device.type == "cpu" else "inductor"

    def note(self, name: str, seconds: float, **others: Any) -> None:
        peak = peak_bytes(self.device) / 1e9
        self.rows.append({"section": self.section, "name": name, "seconds": seconds, "peak_gb": peak} | others)
        self.lines.write(row=self.rows[-1])
        text = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in others.items()
        )
        print(f"| {name} | {seconds:.4g} s | {peak:.2f} GB | {text} |", flush=True)

    def timed(self, name: str, run: Callable[[], object], repeats: int = 1, warm: bool = True, count: int = 0) -> None:
        """Time something, and how many of `count` tokens it does a second."""
        forget_peak(self.device)
        times = seconds_of((run,), repeats, self.device)[0] if warm else [seconds_once(run, self.device)]
        seconds, spread = median_and_spread(times)
        rate = {"tokens_per_second": count / seconds} if count else {}
        self.note(name, seconds, spread=spread, **rate)

    def steps(self) -> None:
        """A denoising step beside its floor."""
        self._time_steps(self._step_works())

    def drawing(self) -> None:
        """Whole pictures."""
        pipe, pixels, steps = self.pipe, self.scale.pixels, self.scale.steps
        size = f"{pixels} px, {steps} steps"
        self.timed(f"drawing, {size}", self._draw, warm=False)
        edit = lambda: pipe(INSTRUCTION, image=picture(pixels), num_inference_steps=steps)  # noqa: E731
        self.timed(f"edit, {size}", edit, warm=False)
        pipe.enable_taylorseer()
        try:
            self.timed(f"drawing, {size}, TaylorSeer", self._draw, warm=False)
        finally:
            pipe.disable_taylorseer()
        self.timed(f"drawing, {pixels // 2} px, {steps} steps", lambda: self._draw(pixels=pixels // 2), warm=False)

    def few_steps(self) -> None:
        """A picture with a few-step adapter that has learned nothing, loaded from its file."""
        pipe = self.pipe
        with tempfile.TemporaryDirectory() as folder:
            pipe.transformer.add_adapter(LoraConfig(r=16, target_modules=LORA_TARGETS["gen"]))
            try:
                pipe.save_lora_weights(
                    folder,
                    transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
                    transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
                    few_steps=FewSteps.of(pipe, FEW_STEPS),
                )
            finally:
                pipe.unload_lora_weights()
            pipe.load_lora_weights(folder)
        try:
            name = f"drawing, {self.scale.pixels} px, {FEW_STEPS} steps of an adapter"
            self.timed(name, lambda: self._draw(num_inference_steps=None))
        finally:
            pipe.unload_lora_weights()

    def bounds(self) -> None:
        """Branches together in a forward, and one by one: what decides `MAX_STEP_TOKENS`."""
        together = denoising.MAX_STEP_TOKENS
        for pixels in (self.scale.pixels // 4, self.scale.pixels // 2, self.scale.pixels):
            for limit, name in ((together, "together"), (1, "one by one")):
                denoising.MAX_STEP_TOKENS = limit
                run = denoise(self.pipe, pixels, 3).run
                self.timed(f"step, edit, {pixels} px, 3 branches {name}", run, self.scale.repeats)
        denoising.MAX_STEP_TOKENS = together

    @torch.no_grad()
    def text(self) -> None:
        """Reading a text and a picture, and writing."""
        pipe, model, length, count = self.pipe, self.pipe.transformer, self.scale.read, self.scale.written
        for batch in (1, self.scale.batch):
            ids = random_ids(pipe, batch, length + 1)
            read = lambda ids=ids: model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1)  # noqa: E731
            self.timed(f"read {length} tokens, batch {batch}", read, self.scale.repeats, count=batch * length)
            cache = read().past_key_values
            write = lambda ids=ids, cache=cache: write_tokens(model, ids, fork_cache(cache), count)  # noqa: E731
            self.timed(f"write {count} tokens after {length}, batch {batch}", write, count=batch * count)
        ids = random_ids(pipe, 1, length + 1)
        static = lambda: model.generate(  # noqa: E731
            input_ids=ids,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            cache_implementation="static",
        )
        self.timed(f"read {length + 1} and write {count} tokens, static cache, compiled by the library", static)
        question = [{"type": "image", "image": picture(self.scale.pixels)}, {"type": "text", "text": "what is it?"}]
        inputs = pipe.processor.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        look = lambda: model(**inputs, use_cache=True, logits_to_keep=1)  # noqa: E731
        self.timed(f"read a picture of {self.scale.pixels} px", look, self.scale.repeats)

    def compiled(self, suffix: str = "") -> None:
        # Behind the recording of the floors, which needs the modules to be called.
        works = self._step_works()
        transformer = self.pipe.transformer
        transformer.compile_repeated_blocks(fullgraph=True, backend=self.backend)
        try:
            first = lambda: self._draw(num_inference_steps=2)  # noqa: E731
            self.timed(f"compiling, first drawing, 2 steps{suffix}", first, warm=False)
            self._time_steps(works, f", layers compiled{suffix}")
            name = f"drawing, {self.scale.pixels} px, {self.scale.steps} steps, layers compiled{suffix}"
            self.timed(name, self._draw, warm=False)
        finally:
            for module in transformer.modules():
                module._compiled_call_impl = None
            torch._dynamo.reset()

    def casting(self) -> None:
        self.pipe.enable_layerwise_casting()
        name = f"drawing, {self.scale.pixels} px, 10 steps, float8 while it rests"
        self.timed(name, lambda: self._draw(num_inference_steps=10))

    def offloading(self) -> None:
        """Groups of layers on the CPU, brought by a stream while the one before computes."""
        stream = self.device.type == "cuda"
        blocks = {"offload_type": "block_level", "num_blocks_per_group": 2, "use_stream": stream}
        self.pipe.enable_group_offload(self.device, **blocks)
        name = f"drawing, {self.scale.pixels} px, 10 steps, groups of 2 layers offloaded"
        self.timed(name, lambda: self._draw(num_inference_steps=10))

    def float8(self) -> None:
        """Products in float8, weights and inputs rounded, compiled: the layers, as `quantization_config` rounds them."""
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        layers = self.pipe.transformer.model.language_model.layers
        quantize_(layers, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
        self.compiled(", float8")

    def training(self) -> None:
        """A training step of a LoRA: its share of the vendor's figure (MFU), and of a large product's speed on this card."""
        step = TrainingStep.of(self.pipe, self.scale.pixels)
        forget_peak(self.device)
        (times,) = seconds_of((step.run,), self.scale.repeats, self.device)
        seconds, spread = median_and_spread(times)
        rate = step.flops / seconds
        card = machine(None)["device"]
        peak = peak_flops(card)
        mfu = {"mfu": rate / peak} if peak else {"mfu": f"left out: no figure of '{card}'"}
        self.note(
            f"training step of a LoRA, {step.tokens} tokens",
            seconds,
            spread=spread,
            tokens_per_second=step.tokens / seconds,
            tflops=rate / 1e12,
            **mfu,
            of_a_product=rate / measured_peak(self.device, DTYPE),
        )

    def _draw(self, pixels: int | None = None, **settings: Any) -> None:
        side = pixels or self.scale.pixels
        self.pipe(PROMPT, height=side, width=side, **({"num_inference_steps": self.scale.steps} | settings))

    def _step_works(self) -> dict[str, Work]:
        kinds = ((1, "drawing, 1 branch"), (2, "drawing, 2 branches"), (3, "edit, 3 branches"))
        return {name: denoise(self.pipe, self.scale.pixels, branches) for branches, name in kinds}

    def _time_steps(self, works: dict[str, Work], suffix: str = "") -> None:
        for name, work in works.items():
            times, floors = seconds_of((work.run, work.floor), self.scale.repeats, self.device)
            (seconds, spread), (floor, _) = median_and_spread(times), median_and_spread(floors)
            self.note(f"step, {name}{suffix}", seconds, spread=spread, floor=floor, ratio=seconds / floor)


SECTIONS = (
    *("steps", "drawing", "few_steps", "bounds", "text", "compiled", "casting", "offloading", "float8", "training"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--small", action="store_true", help="the tests' checkpoint in small pictures, in seconds")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    need_output(parser, "json", args.json)
    lines, failed = Lines(args.lines), False
    lines.write(began="the model")
    start = time.perf_counter()
    pipe = make_pipeline("golden", DTYPE, args.device) if args.small else make_full_size(args.device)
    figures = Figures(pipe, SMALL if args.small else FULL, args.device, lines)
    figures.note("making the model", time.perf_counter() - start)
    for section in sorted(args.sections, key=SECTIONS.index):
        lines.write(began=section)
        figures.section, start = section, time.perf_counter()
        try:
            getattr(figures, section)()
            lines.write(done=section, outcome="passed", seconds=time.perf_counter() - start)
        except Exception as error:
            # The others have their own figures.
            failed = True
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            lines.write(done=section, outcome="failed", reason=reason, seconds=time.perf_counter() - start)
            if isinstance(error, torch.AcceleratorError):
                # The device is of no more use to this process.
                break
        if args.json:
            args.json.write_text(json.dumps(machine(None) | {"rows": figures.rows}, indent=2) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
