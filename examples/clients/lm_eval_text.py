# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""lm-evaluation-harness' `hf` on a local task of text alone: likelihoods of choices, and what is written."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask

import transformers_bagel  # noqa: F401  so that the harness can load BAGEL


CHECKPOINT = Path(__file__).parents[1] / "shapes" / "checkpoint"
COLOURS = ["red", "blue", "green"]
ROWS = [{"question": f"a large {colour} circle", "answer": index} for index, colour in enumerate(COLOURS)]


def main() -> None:
    choices = ConfigurableTask(
        config={
            "task": "shapes_choices",
            "custom_dataset": lambda **kwargs: DatasetDict(test=Dataset.from_list(ROWS)),
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": COLOURS,
            "doc_to_target": "answer",
        }
    )
    words = ConfigurableTask(
        config={
            "task": "shapes_words",
            "custom_dataset": lambda **kwargs: DatasetDict(test=Dataset.from_list(ROWS)),
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{question}}",
            "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 16, "do_sample": False},
        }
    )
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(CHECKPOINT), "dtype": "float32"},
        tasks=[choices, words],
        device="cpu",
        batch_size=2,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    for name, samples in results["samples"].items():
        for sample in samples:
            print(name, repr(sample["doc"]["question"]), sample["filtered_resps"])
    assert len(results["samples"]["shapes_choices"]) == len(results["samples"]["shapes_words"]) == len(ROWS)


if __name__ == "__main__":
    main()
