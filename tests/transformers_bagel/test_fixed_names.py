"""Trainers of others, which pass on the inputs whose names they know, and load a model by the name in its configuration."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig

from tests.conftest import CHECKPOINT, conversation, load_processor


MESSAGES = [conversation(["@wide", "what?"]), conversation(["@tall", "and", "@square", "then?"])]
ARGUMENTS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture(scope="module")
def grids():
    """The same inputs with grids by both names."""
    plain = load_processor().apply_chat_template(MESSAGES, **ARGUMENTS)
    framed = load_processor(return_image_grid_thw=True).apply_chat_template(MESSAGES, **ARGUMENTS)
    return plain, framed


def test_a_processor_may_name_grids_as_qwen_does(grids, tmp_path):
    plain, framed = grids
    assert "image_grid_hw" not in framed
    assert torch.equal(framed["image_grid_thw"][:, 1:], plain["image_grid_hw"])
    assert (framed["image_grid_thw"][:, 0] == 1).all()
    assert torch.equal(framed["input_ids"], plain["input_ids"])
    load_processor(return_image_grid_thw=True).save_pretrained(tmp_path)
    again = type(load_processor()).from_pretrained(tmp_path)
    assert "image_grid_thw" in again.apply_chat_template(MESSAGES[0], **ARGUMENTS)


@pytest.mark.parametrize("inner", [False, True], ids=["model", "its part below the head, as TRL calls it"])
def test_a_forward_takes_either_name(inner, grids, model):
    part = model.model if inner else model
    with torch.no_grad():
        plain, framed = (part(**inputs) for inputs in grids)
    name = "last_hidden_state" if inner else "logits"
    assert torch.equal(plain[name], framed[name])


def test_generation_takes_either_name(grids, model):
    plain, framed = (
        model.generate(**inputs, max_new_tokens=4, num_return_sequences=2, do_sample=False, num_beams=2)
        for inputs in grids
    )
    assert torch.equal(plain, framed)


def test_a_pipeline_draws_with_such_a_processor(model, vae):
    from diffusers_bagel import BagelPipeline

    images = []
    for processor in (load_processor(), load_processor(return_image_grid_thw=True)):
        pipe = BagelPipeline.from_pretrained(CHECKPOINT, transformer=model, vae=vae, processor=processor)
        pipe.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 1, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        images.append(pipe(messages=MESSAGES[1], **settings).images)
    assert torch.equal(*images)


@pytest.mark.parametrize("grid", [[[2, 3, 4]], [[3, 4]]], ids=["video", "no frames"])
def test_grids_of_videos_are_refused(grid, model):
    with pytest.raises(ValueError, match="`image_grid_thw`.*videos"):
        model(input_ids=torch.tensor([[5, 6]]), pixel_values=torch.zeros(12, 588), image_grid_thw=torch.tensor(grid))


def test_a_lost_grid_is_named_with_the_remedy(grids, model):
    inputs = {name: value for name, value in grids[0].items() if name != "image_grid_hw"}
    with pytest.raises(ValueError, match="`image_grid_hw`.*return_image_grid_thw=True"):
        model(**inputs)


def test_a_configuration_names_no_code_of_its_own(tmp_path):
    """Trainers that get a model as a string look there for a class that transformers does not have."""
    config = AutoConfig.from_pretrained(CHECKPOINT)
    assert config.auto_map == {}
    config.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
