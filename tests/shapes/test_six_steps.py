"""The shipped adapter of six steps: its size, what it says of itself, and that its pictures are right."""

from __future__ import annotations

import json

import few_steps
import pytest
import torch
from evaluate import Evaluation, main
from judge import draw_cases, edit_cases

from diffusers_bagel import BagelPipeline
from tests.shapes.conftest import CHECKPOINT, SHAPES


ADAPTER = SHAPES / "six_steps"
NUM = 24
# What `Evaluation` sets is left to the pipeline.
BY_ITSELF = {"num_inference_steps": None, "guidance_scale": None}


@pytest.fixture(scope="module")
def quick() -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT)
    pipe.load_lora_weights(ADAPTER)
    return pipe


@pytest.mark.parametrize("others", [False, True], ids=["the shipped checkpoint", "other weights"])
def test_it_is_of_the_shipped_checkpoint(caplog, others):
    # Here and not in a fixture, whose warnings the test would not see.
    pipe = BagelPipeline.from_pretrained(CHECKPOINT)
    if others:
        with torch.no_grad():
            for parameter in pipe.transformer.parameters():
                parameter.mul_(2)
    pipe.load_lora_weights(ADAPTER)
    assert ("other weights" in caplog.text) == others


def test_it_is_small_and_names_its_checkpoint(quick):
    (file,) = ADAPTER.glob("*.safetensors")
    assert file.stat().st_size < 2_000_000
    assert quick.few_steps.num_inference_steps == 6
    base = BagelPipeline.lora_state_dict(ADAPTER, return_lora_metadata=True)[1]["transformer.base_model_name_or_path"]
    assert base == "examples/shapes/checkpoint"


def test_it_draws_and_edits_right_with_nothing_said(quick, monkeypatch):
    evaluation, forwards = Evaluation(quick, NUM), []
    hook = quick.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append("latent_grid_hw" in kwargs and "input_ids" not in kwargs),
        with_kwargs=True,
    )
    assert evaluation.draw(draw_cases("draw_full", NUM, 0, None), **BY_ITSELF) >= 0.9
    assert sum(forwards) == 6
    edited = evaluation.edit(edit_cases(NUM, 0), **BY_ITSELF, image_guidance_scale=None)["all"]
    hook.remove()
    assert edited >= 0.8
    assert sum(forwards) == 12


def test_evaluate_has_a_row_for_each_number_of_steps(tmp_path):
    main(["--few_steps", str(ADAPTER), "--num", "2", "--json", str(tmp_path / "table.json")])
    table = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    for task in ("draw_full", "draw_with_plan", "relation", "edit"):
        names = [
            f"{task}_{name}" for name in ("25_plain_steps", "49_plain_steps", *(f"{n}_steps" for n in (1, 2, 4, 6, 8)))
        ]
        assert [name for name in table if name.startswith(f"{task}_")] == names


@pytest.mark.slow
def test_its_training_runs(tmp_path):
    few_steps.main(["--output_dir", str(tmp_path), "--steps", "1", "--samples", "30"])
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()
