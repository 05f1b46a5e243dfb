# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Measure bagel-shapes on scenes that it never saw: `python examples/shapes/evaluate.py --num 300 --json out.json`."""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from asking import BATCH_SIZE, DRAWING, EDITING, MAX_TOKENS, STEPS
from judge import (
    PROMPTS,
    AskCase,
    DecideCase,
    DrawCase,
    EditCase,
    StepsCase,
    are_steps,
    ask_cases,
    decide_cases,
    described_share,
    draw_cases,
    edit_cases,
    is_drawn,
    is_edited,
    riddle_cases,
    seen,
    steps_cases,
    unseen_scene,
)
from language import DESCRIBE, QUESTIONS, question
from parts import CHECKPOINT
from PIL import Image
from reader import read
from tasks import conversation, text
from tqdm.auto import tqdm
from world import Scene, random_scene, render

from diffusers_bagel import BagelPipeline, BagelReply, BagelSession, send_all


FEW_STEPS = (1, 2, 4, 6, 8)


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
        return float(np.mean(self.drawn(cases, **settings)))

    def drawn(self, cases: Sequence[DrawCase], **settings: Any) -> list[bool]:
        """Whether each picture shows what was asked for."""
        settings = {"num_inference_steps": STEPS, "max_think_tokens": MAX_TOKENS} | DRAWING | settings
        right: list[bool] = []
        for start in range(0, len(cases), BATCH_SIZE):
            batch = cases[start : start + BATCH_SIZE]
            pictures = self.pipe(
                prompt=[case.prompt for case in batch], generator=_generators(start, len(batch)), **settings
            ).images
            right += [is_drawn(picture, case) for picture, case in zip(pictures, batch, strict=True)]
        return right

    def edit(self, cases: Sequence[EditCase], **settings: Any) -> dict[str, float]:
        """Share of instructions whose picture is as it should become, of each kind and of all."""
        return _shares([case.kind for case in cases], self.edited(cases, **settings))

    def edited(self, cases: Sequence[EditCase], **settings: Any) -> list[bool]:
        """Whether each picture is as it should become."""
        settings = {"num_inference_steps": STEPS} | EDITING | settings
        right: list[bool] = []
        for start in range(0, len(cases), BATCH_SIZE):
            batch = cases[start : start + BATCH_SIZE]
            pictures = self.pipe(
                prompt=[case.instruction for case in batch],
                image=[[render(case.scene)] for case in batch],
                generator=_generators(start, len(batch)),
                **settings,
            ).images
            right += [is_edited(picture, case.target) for picture, case in zip(pictures, batch, strict=True)]
        return right

    def answers(self, cases: Sequence[AskCase], think: bool = False) -> dict[str, float]:
        """Share of questions that are answered word for word, of each kind and of all."""
        return _shares([case.kind for case in cases], self.answered(cases, think))

    def answered(self, cases: Sequence[AskCase], think: bool = False) -> list[bool]:
        """Whether each question is answered word for word."""
        said = answer(self.pipe, [render(case.scene) for case in cases], [case.question for case in cases], think)
        return [words == case.answer for case, words in zip(cases, said, strict=True)]

    def decide(self, cases: Sequence[DecideCase]) -> float:
        """Share of requests that are answered with words and pictures in the right order."""
        requests = [([] if case.scene is None else [render(case.scene)]) + [case.request] for case in cases]
        replies = self.converse([BagelSession(self.pipe) for _ in cases], requests)
        kinds = [tuple(part["type"] for part in reply.content) for reply in replies]
        return float(np.mean([found == case.kinds for found, case in zip(kinds, cases, strict=True)]))

    def show_steps(self, cases: Sequence[StepsCase]) -> float:
        """Share of requests for steps of which every picture is right."""
        return float(np.mean(self.showed_steps(cases)))

    def showed_steps(self, cases: Sequence[StepsCase]) -> list[bool]:
        """Whether every picture of each answer is right."""
        replies = self.converse([BagelSession(self.pipe) for _ in cases], [[case.request] for case in cases])
        return [are_steps(reply.images, case) for reply, case in zip(replies, cases, strict=True)]

    def look_again(self, cases: Sequence[DrawCase]) -> float:
        """Share of drawings about which a question is answered word for word, as the judge sees them."""
        sessions = [BagelSession(self.pipe) for _ in cases]
        drawn = self.converse(sessions, [[case.prompt] for case in cases])
        scenes = [read(reply.images[-1]) if reply.images else None for reply in drawn]
        asked = [self.question_about(scene, index) for index, scene in enumerate(scenes)]
        replies = self.converse(sessions, [[question] for question, _ in asked])
        return float(np.mean([reply.text == answer for reply, (_, answer) in zip(replies, asked, strict=True)]))

    def question_about(self, scene: Scene | None, index: int) -> tuple[str, str | None]:
        """A question about a picture and its answer, which is none if the picture is nothing of this world."""
        if scene is None or not scene.things or any("unknown" in thing.pair for thing in scene.things):
            return "how many things are there?", None
        generator, asked = random.Random(f"look again {self.seed} {index}"), None
        while asked is None:
            asked = question(generator, scene, generator.choice(QUESTIONS))
        return asked

    def converse(self, sessions: Sequence[BagelSession], contents: Sequence[list[Any]]) -> list[BagelReply]:
        """Answers of sessions that decide what they answer with."""
        replies: list[BagelReply] = []
        for start in range(0, len(sessions), BATCH_SIZE):
            turns = list(zip(sessions, contents, strict=True))[start : start + BATCH_SIZE]
            settings = {"num_inference_steps": STEPS, "max_new_tokens": MAX_TOKENS} | EDITING
            replies += send_all(turns, generator=_generators(start, len(turns)), **settings)
        return replies

    def describe(self) -> float:
        """Share of objects that are described with their size, colour, shape and place."""
        generator = random.Random(f"describe {self.seed}")
        scenes = [unseen_scene(generator) for _ in range(self.num)]
        texts = answer(self.pipe, [render(scene) for scene in scenes], [generator.choice(DESCRIBE) for _ in scenes])
        return float(np.mean([described_share(text, scene) for text, scene in zip(texts, scenes, strict=True)]))

    def cases(self, task: str, num_things: int | None = None) -> list[DrawCase]:
        return draw_cases(task, self.num, self.seed, num_things)


def answer(
    pipe: BagelPipeline, pictures: Sequence[Image.Image], questions: Sequence[str], think: bool = False
) -> list[str]:
    """What the model says about pictures, one question each, less what it thought."""
    said: list[str] = []
    for start in range(0, len(pictures), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        conversations = [
            conversation(("user", [{"type": "image", "image": picture}, text(question)]))
            for picture, question in zip(pictures[batch], questions[batch], strict=True)
        ]
        inputs = pipe.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            think=think,
        )
        ids = pipe.transformer.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        said += pipe.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [words.rpartition("</think>")[2].strip() for words in said]


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
    images, right = pipe.processor.image_processor, 0
    for scene in scenes:
        pixels = images(render(scene), return_vae_pixel_values=True, return_tensors="pt")["vae_pixel_values"][0]
        grid = (pixels.shape[1] // images.vae_stride, pixels.shape[2] // images.vae_stride)
        latents = pipe.encode_image(pixels, vae_sample_mode="argmax")
        (picture,) = pipe.decode_latents(latents[None], grid, "pil")
        right += seen(read(picture)) == seen(scene)
    return right / num


def _generators(start: int, count: int) -> list[torch.Generator]:
    """A picture's noise follows from the number of its case."""
    return [torch.Generator().manual_seed(start + index) for index in range(count)]


def _shares(kinds: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    of_kinds: dict[str, list[bool]] = {}
    for kind, value in zip(kinds, right, strict=True):
        of_kinds.setdefault(kind, []).append(value)
    return {kind: float(np.mean(values)) for kind, values in of_kinds.items()} | {"all": float(np.mean(right))}


def rows(evaluation: Evaluation, bf16: Callable[[], BagelPipeline]) -> dict[str, float]:
    """All rows of the table, in its order."""
    table: dict[str, float] = {}
    pipe, num, seed = evaluation.pipe, evaluation.num, evaluation.seed
    cases = {task: evaluation.cases(task) for task in PROMPTS}
    edits, questions, riddles = edit_cases(num, seed), ask_cases(num, seed), riddle_cases(num, seed)
    progress = tqdm(desc="Rows", unit="row")

    def add(name: str, value: float) -> None:
        table[name] = round(value, 4)
        progress.update()
        progress.set_postfix({name: f"{value:.3f}"})

    def add_kinds(name: str, shares: dict[str, float]) -> None:
        for kind, share in shares.items():
            add(name if kind == "all" else f"{name}_{kind}", share)

    add("judge_error", judge_error(max(num, 2000), seed))
    add("vae", reconstruction_score(pipe, num, seed))
    add("draw_full", evaluation.draw(cases["draw_full"]))
    add("draw_without_plan", evaluation.draw(cases["draw"]))
    add("draw_with_plan", evaluation.draw(cases["draw"], think=True))
    add("draw", max(table["draw_without_plan"], table["draw_with_plan"]))
    add("relation_without_plan", evaluation.draw(cases["relation"]))
    add("relation", evaluation.draw(cases["relation"], think=True))
    add_kinds("edit", evaluation.edit(edits))
    add_kinds("ask", evaluation.answers(questions))
    add_kinds("ask_with_thought", evaluation.answers(questions, think=True))
    add("describe", evaluation.describe())
    add("riddle_with_plan", evaluation.draw(cases["riddle"], think=True))
    add("riddle_without_plan", evaluation.draw(cases["riddle"]))
    add("think_gain", table["riddle_with_plan"] - table["riddle_without_plan"])
    add("riddle_answer", evaluation.answers(riddles)["all"])
    add("riddle_answer_with_thought", evaluation.answers(riddles, think=True)["all"])
    add("decides", evaluation.decide(decide_cases(num, seed)))
    add("steps", evaluation.show_steps(steps_cases(num, seed)))
    add("look_again", evaluation.look_again(cases["draw_full"]))
    for count, name in ((1, "unseen_pair"), (2, "2_objects"), (3, "3_objects")):
        add(f"draw_full_{name}", evaluation.draw(evaluation.cases("draw_full", count)))
    add("draw_unseen_pair", evaluation.draw(evaluation.cases("draw", 1)))
    for scale in (1.0, 2.0, 3.0, 4.0):
        settings = {"guidance_scale": scale}
        name = f"draw_full_guidance_{scale:g}"
        add(name, table["draw_full"] if settings == DRAWING else evaluation.draw(cases["draw_full"], **settings))
    for scale in (1.0, 1.5, 2.0):
        same = scale == EDITING["image_guidance_scale"]
        name = f"edit_image_guidance_{scale:g}"
        add(name, table["edit"] if same else evaluation.edit(edits, image_guidance_scale=scale)["all"])
    for steps in (10, 25, 49):
        same = steps == STEPS
        name = f"draw_full_{steps}_steps"
        add(name, table["draw_full"] if same else evaluation.draw(cases["draw_full"], num_inference_steps=steps))
    pipe.enable_taylorseer()
    add("draw_full_taylorseer_49_steps", evaluation.draw(cases["draw_full"], num_inference_steps=49))
    pipe.disable_taylorseer()
    low = Evaluation(bf16(), num, seed)
    add("draw_full_bf16", low.draw(cases["draw_full"]))
    add("edit_bf16", low.edit(edits)["all"])
    progress.close()
    return table


def few_step_rows(evaluation: Evaluation, adapter: str) -> tuple[dict[str, float], dict[str, float]]:
    """What a few-step adapter draws in each number of steps, beside the model without it, and the forwards of a picture."""
    pipe, num, seed = evaluation.pipe, evaluation.num, evaluation.seed
    full, ordinary, relations = (evaluation.cases(task) for task in ("draw_full", "draw", "relation"))
    edits = edit_cases(num, seed)
    table: dict[str, float] = {}
    forwards: dict[str, float] = {}

    def add(name: str, **settings: Any) -> None:
        scores: dict[str, Callable[[], float]] = {
            "draw_full": lambda: evaluation.draw(full, **settings),
            "draw_with_plan": lambda: evaluation.draw(ordinary, think=True, **settings),
            "relation": lambda: evaluation.draw(relations, think=True, **settings),
            "edit": lambda: evaluation.edit(edits, **settings)["all"],
        }
        for task, score in scores.items():
            with counted_forwards(pipe) as counts:
                table[f"{task}_{name}"] = round(score(), 4)
            forwards[f"{task}_{name}"] = sum(counts) / num

    # What cannot be loaded is said now, not behind the pictures of the model without it.
    pipe.load_lora_weights(adapter)
    pipe.disable_lora()
    for steps in (STEPS, 49):
        add(f"{steps}_plain_steps", num_inference_steps=steps)
    pipe.enable_lora()
    for steps in FEW_STEPS:
        add(f"{steps}_steps", num_inference_steps=steps, guidance_scale=1.0, image_guidance_scale=1.0)
    return table, forwards


@contextmanager
def counted_forwards(pipe: BagelPipeline) -> Iterator[list[int]]:
    """Of each denoising step the forwards of one branch of one picture, several of which may be computed as one."""
    counts: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("input_ids") is None and kwargs.get("latents") is not None:
            counts.append(len(kwargs["latent_grid_hw"]))

    hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


def _can_be_written(file: Path) -> bool:
    place = file if file.exists() else file.parent
    return place.is_dir() != file.exists() and os.access(place, os.W_OK)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="a repository of this world, or the shipped one")
    parser.add_argument("--num", type=int, default=300, help="cases a task")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument(
        "--few_steps", metavar="ADAPTER", help="a folder: of its drawings alone, in each number of steps"
    )
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args(arguments)
    if args.num < 1:
        parser.error(f"--num must be at least 1, got {args.num}.")
    if args.json and not _can_be_written(args.json):
        parser.error(f"--json must be a file in a folder that is there and can be written to, got '{args.json}'.")
    start = time.perf_counter()
    pipe = BagelPipeline.from_pretrained(args.checkpoint, dtype=torch.float32)
    evaluation = Evaluation(pipe, args.num, args.seed)
    forwards: dict[str, float] = {}
    if args.few_steps:
        table, forwards = few_step_rows(evaluation, args.few_steps)
    else:
        table = rows(evaluation, lambda: BagelPipeline.from_pretrained(args.checkpoint, dtype=torch.bfloat16))
    for name, value in table.items():
        print(f"{name:32} {value:8.2%}" + (f" {forwards[name]:6g} forwards" if name in forwards else ""))
    print(f"{args.num} cases a task, {time.perf_counter() - start:.0f} s")
    if args.json:
        results: dict[str, Any] = {"num": args.num, "seed": args.seed} | table
        if forwards:
            results["forwards"] = forwards
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
