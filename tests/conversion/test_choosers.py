"""diffusers' classes that choose a pipeline by themselves, on every layout that BAGEL has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT


CHOOSERS = [DiffusionPipeline, AutoPipelineForText2Image, AutoPipelineForImage2Image]
LAYOUTS = ["original", "saved", "converted"]


@pytest.fixture(scope="module")
def layouts(repository, tmp_path_factory) -> dict[str, Path]:
    saved = tmp_path_factory.mktemp("saved")
    BagelPipeline.from_pretrained(CHECKPOINT).save_pretrained(saved)
    return {"original": CHECKPOINT, "saved": saved, "converted": repository}


def drawn(pipe) -> torch.Tensor:
    assert type(pipe) is BagelPipeline
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a", height=32, width=32, num_inference_steps=1, output_type="latent", generator=generator).images


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chooser", CHOOSERS)
def test_every_chooser_finds_the_pipeline(chooser, layout, layouts):
    expected = drawn(BagelPipeline.from_pretrained(layouts[layout]))
    assert torch.equal(drawn(chooser.from_pretrained(layouts[layout])), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chooser", [DiffusionPipeline, BagelPipeline])
def test_a_balanced_device_map_finds_every_component(chooser, layout, layouts):
    """In a repository that serves both libraries the transformer has no folder."""
    pipe = chooser.from_pretrained(layouts[layout], device_map="balanced")
    assert torch.equal(drawn(pipe), drawn(BagelPipeline.from_pretrained(layouts[layout])))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", (torch.bfloat16, torch.bfloat16)),
        ("auto", (torch.float32, torch.float32)),
        ({"transformer": "bfloat16", "default": "float32"}, (torch.bfloat16, torch.float32)),
        ({"transformer": "auto", "vae": torch.bfloat16}, (torch.float32, torch.bfloat16)),
    ],
)
def test_types_may_be_named(dtype, expected, layout, layouts):
    pipe = DiffusionPipeline.from_pretrained(layouts[layout], dtype=dtype)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_type_that_there_is_not_is_refused(layout, layouts):
    with pytest.raises(ValueError, match="`dtype`.*'bf16'"):
        AutoPipelineForText2Image.from_pretrained(layouts[layout], dtype="bf16")


def test_one_pipeline_becomes_the_other(layouts):
    pipe = AutoPipelineForText2Image.from_pretrained(layouts["saved"])
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    assert torch.equal(drawn(other), drawn(pipe))


def test_code_of_a_repository_that_is_trusted_comes_first(layouts, tmp_path):
    folder = tmp_path / "stranger"
    shutil.copytree(layouts["converted"], folder)
    (folder / "pipeline.py").write_text("raise ImportError('a stranger')")
    assert type(DiffusionPipeline.from_pretrained(folder)) is BagelPipeline
    with pytest.raises(ImportError, match="a stranger"):
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_other_pipelines_are_left_to_the_library(chooser, tmp_path):
    with pytest.raises(OSError, match="no file named model_index.json"):
        chooser.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline", "_diffusers_version": "0"}))
    with pytest.raises((AttributeError, ValueError), match="OtherPipeline"):
        chooser.from_pretrained(tmp_path)
