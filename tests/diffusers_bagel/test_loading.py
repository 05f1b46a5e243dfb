"""The pipeline from the original layout, with the arguments of diffusers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from diffusers_bagel import BagelPipeline
from diffusers_bagel.loading import load_original_vae
from tests.conftest import CHECKPOINT
from transformers_bagel import BagelForConditionalGeneration


BF16, F32 = torch.bfloat16, torch.float32
DTYPES = {
    "none": ({}, F32, F32),
    "name": ({"dtype": "bfloat16"}, BF16, BF16),
    "old_name": ({"torch_dtype": BF16}, BF16, BF16),
    "of_the_files": ({"dtype": "auto"}, BF16, F32),
    "each": ({"dtype": {"transformer": "bfloat16", "default": F32}}, BF16, F32),
    "usual": ({"dtype": BF16, "low_cpu_mem_usage": True, "use_safetensors": True, "variant": None}, BF16, BF16),
    "placed": ({"dtype": BF16, "device_map": "cpu"}, BF16, BF16),
}
REFUSED = {
    "variant": {"variant": "fp16"},
    "use_safetensors": {"use_safetensors": False},
    "dtype": {"dtype": "bf16"},
    "custom_pipeline": {"custom_pipeline": "other"},
}


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory):
    """The golden checkpoint, whose configuration says that the model is to be bfloat16."""
    folder = tmp_path_factory.mktemp("original") / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    return folder


@pytest.mark.parametrize("given", DTYPES)
def test_components_have_the_type_that_is_asked_for(given, in_bfloat16):
    kwargs, transformer, vae = DTYPES[given]
    pipe = BagelPipeline.from_pretrained(in_bfloat16, **kwargs)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (transformer, vae)


@pytest.mark.parametrize("argument", REFUSED)
def test_arguments_that_cannot_work_are_refused_before_weights_are_read(argument, monkeypatch):
    monkeypatch.setattr(BagelForConditionalGeneration, "from_pretrained", lambda *args, **kwargs: pytest.fail("read"))
    with pytest.raises((TypeError, ValueError), match=argument):
        BagelPipeline.from_pretrained(CHECKPOINT, **REFUSED[argument])


def test_a_missing_vae_is_named(tmp_path):
    with pytest.raises(OSError, match=r"ae\.safetensors"):
        load_original_vae(tmp_path)


def test_repositories_that_name_transformers_lead_to_our_classes():
    index = {"transformer": ["transformers", "BagelForConditionalGeneration"], "vae": ["diffusers", "AutoencoderKL"]}
    found, _, _ = BagelPipeline.extract_init_dict(index)
    assert found["transformer"] == ["transformers_bagel.modeling_bagel", "BagelForConditionalGeneration"]
    assert found["transformer"][0] in LOADABLE_CLASSES and found["vae"] == index["vae"]
