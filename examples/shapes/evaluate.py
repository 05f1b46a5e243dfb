# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Measure bagel-shapes on scenes that it never saw: `python examples/shapes/evaluate.py --num 300 --json out.json`."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge import (
    PROMPTS,
    DrawCase,
    EditCase,
    ask_cases,
    described_share,
    draw_cases,
    edit_cases,
    is_drawn,
    is_edited,
    seen,
    unseen_scene,
)
from language import DESCRIBE, EDITS, QUESTIONS
from PIL import Image
from reader import read
from tasks import conversation, image, text
from tqdm.auto import tqdm
from world import Scene, random_scene, render

from diffusers_bagel import BagelPipeline


CHECKPOINT = Path(__file__).parent / "checkpoint"
BATCH_SIZE = 25
# What all rows use but those about one of them.
STEPS = 25
DRAWING = {"guidance_scale": 3.0}
EDITING = {"guidance_scale": 3.0, "image_guidance_scale": 1.5}
MAX_TOKENS = 64


class Evaluation:
    """
    Answers and drawings of a pipeline, judged.

    Args:
        pipe ([`BagelPipeline`])
        num (`int`): Cases a task.
        seed (`int`): Of the cases; another one gives others.
    """

    def __init__(self, pipe: BagelPipeline, num: int, seed: int = 0):
        self.pipe = pipe
        self.num = num
        self.seed = seed
        pipe.set_progress_bar_config(disable=True)

    def draw(self, cases: Sequence[DrawCase], **settings: Any) -> float:
        """Share of prompts whose picture shows what was asked for."""
        settings = {"num_inference_steps": STEPS, "max_think_tokens": MAX_TOKENS} | DRAWING | settings
        right = 0
        for start in range(0, len(cases), BATCH_SIZE):
            batch = cases[start : start + BATCH_SIZE]
            pictures = self.pipe(
                prompt=[case.prompt for case in batch], generator=_generators(start, len(batch)), **settings
            ).images
            right += sum(is_drawn(picture, case) for picture, case in zip(pictures, batch, strict=True))
        return right / len(cases)

    def edit(self, cases: Sequence[EditCase], **settings: Any) -> dict[str, float]:
        """Share of instructions whose picture is as it should become, of each kind and of all."""
        settings = {"num_inference_steps": STEPS} | EDITING | settings
        right: dict[str, list[bool]] = {kind: [] for kind in EDITS}
        for start in range(0, len(cases), BATCH_SIZE):
            batch = cases[start : start + BATCH_SIZE]
            pictures = self.pipe(
                prompt=[case.instruction for case in batch],
                image=[[render(case.scene)] for case in batch],
                generator=_generators(start, len(batch)),
                **settings,
            ).images
            for picture, case in zip(pictures, batch, strict=True):
                right[case.kind].append(is_edited(picture, case.target))
        return _shares(right)

    def answer(self, scenes: Sequence[Scene], questions: Sequence[str], think: bool = False) -> list[str]:
        """What the model says about pictures, less what it thought."""
        processor, answers = self.pipe.processor, []
        for start in range(0, len(scenes), BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            conversations = [
                conversation(("user", [image(scene), text(question)]))
                for scene, question in zip(scenes[batch], questions[batch], strict=True)
            ]
            inputs = processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                think=think,
            )
            ids = self.pipe.transformer.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
            answers += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.rpartition("</think>")[2].strip() for answer in answers]

    def ask(self, think: bool = False) -> dict[str, float]:
        """Share of questions that are answered word for word, of each kind and of all."""
        cases = ask_cases(self.num, self.seed)
        answers = self.answer([case.scene for case in cases], [case.question for case in cases], think)
        right: dict[str, list[bool]] = {kind: [] for kind in QUESTIONS}
        for case, answer in zip(cases, answers, strict=True):
            right[case.kind].append(answer == case.answer)
        return _shares(right)

    def describe(self) -> float:
        """Share of objects that are described with their size, colour, shape and place."""
        generator = random.Random(f"describe {self.seed}")
        scenes = [unseen_scene(generator) for _ in range(self.num)]
        texts = self.answer(scenes, [generator.choice(DESCRIBE) for _ in scenes])
        return float(np.mean([described_share(text, scene) for text, scene in zip(texts, scenes, strict=True)]))

    def cases(self, task: str, num_things: int | None = None) -> list[DrawCase]:
        return draw_cases(task, self.num, self.seed, num_things)


def judge_error(num: int, seed: int = 0) -> float:
    """Share of true renderings that the judge misreads."""
    generator = random.Random(f"judge {seed}")
    scenes = [random_scene(generator, held_out=index % 2 == 0) for index in range(num)]
    return float(np.mean([seen(read(render(scene))) != seen(scene) for scene in scenes]))


@torch.no_grad()
def reconstruction_score(pipe: BagelPipeline, num: int, seed: int = 0) -> float:
    """Share of pictures that the judge reads right after the VAE has encoded and decoded them: the ceiling."""
    generator = random.Random(f"vae {seed}")
    scenes = [unseen_scene(generator) for _ in range(num)]
    right = 0
    for scene in scenes:
        pixels = torch.from_numpy(np.asarray(render(scene)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        latents = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.mode()
        decoded = pipe.vae.decode(latents).sample[0].float().clamp(-1, 1)
        picture = Image.fromarray(((decoded + 1) * 127.5).to(torch.uint8).permute(1, 2, 0).numpy())
        right += seen(read(picture)) == seen(scene)
    return right / num


def _generators(start: int, count: int) -> list[torch.Generator]:
    """A picture's noise follows from the number of its case."""
    return [torch.Generator().manual_seed(start + index) for index in range(count)]


def _shares(right: dict[str, list[bool]]) -> dict[str, float]:
    everything = [value for values in right.values() for value in values]
    return {kind: float(np.mean(values)) for kind, values in right.items() if values} | {
        "all": float(np.mean(everything))
    }


def rows(evaluation: Evaluation, bf16: Callable[[], BagelPipeline]) -> dict[str, float]:
    """All rows of the table, in its order."""
    table: dict[str, float] = {}
    pipe, num = evaluation.pipe, evaluation.num
    cases = {task: evaluation.cases(task) for task in PROMPTS}
    edits = edit_cases(num, evaluation.seed)
    progress = tqdm(desc="Rows", unit="row")

    def add(name: str, value: float) -> None:
        table[name] = round(value, 4)
        progress.update()
        progress.set_postfix({name: f"{value:.3f}"})

    add("judge_error", judge_error(max(num, 2000), evaluation.seed))
    add("vae", reconstruction_score(pipe, num, evaluation.seed))
    add("draw_full", evaluation.draw(cases["draw_full"]))
    add("draw_without_plan", evaluation.draw(cases["draw"]))
    add("draw_with_plan", evaluation.draw(cases["draw"], think=True))
    add("draw", max(table["draw_without_plan"], table["draw_with_plan"]))
    add("relation_without_plan", evaluation.draw(cases["relation"]))
    add("relation", evaluation.draw(cases["relation"], think=True))
    for kind, share in evaluation.edit(edits).items():
        add("edit" if kind == "all" else f"edit_{kind}", share)
    for think, way in ((False, "without_thought"), (True, "with_thought")):
        for kind, share in evaluation.ask(think).items():
            add(f"ask_{way}" if kind == "all" else f"ask_{kind}_{way}", share)
    add("ask", max(table["ask_without_thought"], table["ask_with_thought"]))
    add("describe", evaluation.describe())
    add("riddle_with_plan", evaluation.draw(cases["riddle"], think=True))
    add("riddle_without_plan", evaluation.draw(cases["riddle"]))
    add("think_gain", table["riddle_with_plan"] - table["riddle_without_plan"])
    for count in (1, 2, 3):
        name = "draw_full_unseen_pair" if count == 1 else f"draw_full_{count}_objects"
        add(name, evaluation.draw(evaluation.cases("draw_full", count)))
    add("draw_unseen_pair", evaluation.draw(evaluation.cases("draw", 1)))
    for scale in (1.0, 2.0, 3.0, 4.0):
        add(f"draw_full_guidance_{scale:g}", evaluation.draw(cases["draw_full"], guidance_scale=scale))
    for scale in (1.0, 1.5, 2.0):
        add(f"edit_image_guidance_{scale:g}", evaluation.edit(edits, image_guidance_scale=scale)["all"])
    for steps in (10, 25, 49):
        add(f"draw_full_{steps}_steps", evaluation.draw(cases["draw_full"], num_inference_steps=steps))
    pipe.enable_taylorseer()
    add("draw_full_taylorseer_49_steps", evaluation.draw(cases["draw_full"], num_inference_steps=49))
    pipe.disable_taylorseer()
    low = Evaluation(bf16(), num, evaluation.seed)
    add("draw_full_bf16", low.draw(cases["draw_full"]))
    add("edit_bf16", low.edit(edits)["all"])
    progress.close()
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="a repository of this world, or the shipped one")
    parser.add_argument("--num", type=int, default=300, help="cases a task")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--json", help="write the table here")
    args = parser.parse_args(arguments)
    if args.num < 1:
        parser.error(f"--num must be at least 1, got {args.num}.")
    start = time.perf_counter()
    pipe = BagelPipeline.from_pretrained(args.checkpoint, dtype=torch.float32)
    table = rows(
        Evaluation(pipe, args.num, args.seed),
        lambda: BagelPipeline.from_pretrained(args.checkpoint, dtype=torch.bfloat16),
    )
    for name, value in table.items():
        print(f"{name:32} {value:8.2%}")
    print(f"{args.num} cases a task, {time.perf_counter() - start:.0f} s")
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
