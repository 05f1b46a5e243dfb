# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""lm-evaluation-harness on questions about pictures, and our own evaluation on the same: item by item.

python examples/clients/lm_eval_multimodal.py --num 24
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, Value
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask

import transformers_bagel  # noqa: F401  so that the harness can load BAGEL
from diffusers_bagel import BagelPipeline


SHAPES = Path(__file__).parents[1] / "shapes"
sys.path.insert(0, str(SHAPES))

from evaluate import MAX_TOKENS, answer  # noqa: E402
from judge import ask_cases  # noqa: E402
from world import render  # noqa: E402


def local_task(rows: list[dict[str, Any]]) -> ConfigurableTask:
    """A task of the harness whose documents are rows of `image`, `question` and `answer`."""
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    return ConfigurableTask(
        config={
            "task": "shapes_questions",
            "custom_dataset": lambda **kwargs: DatasetDict(test=Dataset.from_list(rows, features=features)),
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_image": ["image"],
            "doc_to_text": lambda row: "<image>" + row["question"],
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": MAX_TOKENS, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(SHAPES / "checkpoint"))
    parser.add_argument("--num", type=int, default=24)
    args = parser.parse_args()
    cases = ask_cases(args.num)
    rows: list[dict[str, Any]] = [
        {"image": render(case.scene), "question": case.question, "answer": case.answer} for case in cases
    ]
    results = simple_evaluate(
        model="hf-multimodal",
        model_args={"pretrained": args.checkpoint, "dtype": "float32"},
        tasks=[local_task(rows)],
        device="cpu",
        batch_size=8,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["shapes_questions"], key=lambda sample: sample["doc_id"])
    theirs = [sample["filtered_resps"][0].strip() for sample in samples]
    pipe = BagelPipeline.from_pretrained(args.checkpoint)
    ours = answer(pipe, [row["image"] for row in rows], [row["question"] for row in rows])
    for row, their, our in list(zip(rows, theirs, ours, strict=True))[:4]:
        print(f"{row['question']!r}: harness {their!r}, own {our!r}, right {row['answer']!r}")
    assert theirs == ours, [pair for pair in zip(theirs, ours, strict=True) if pair[0] != pair[1]]
    score = results["results"]["shapes_questions"]["exact_match,none"]
    own_score = sum(words == row["answer"] for words, row in zip(ours, rows, strict=True)) / len(rows)
    assert score == own_score
    print(f"{len(rows)} answers are the same; exact_match {score:.4f}, own score {own_score:.4f}")


if __name__ == "__main__":
    main()
