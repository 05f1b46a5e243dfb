"""What the original layout cannot hold is named before anything is written; what it can hold comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_hf_to_bagel import main as convert_back
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from diffusers_bagel import BagelPipeline
from tests.conftest import load_processor
from tests.diffusers_bagel.test_lora import save_peft
from transformers_bagel import BagelForConditionalGeneration, BagelProcessor


SHAPES = Path(__file__).parents[2] / "examples" / "shapes" / "checkpoint"
# File, changes, and what the error says.
LOST: list[tuple[str, dict[str, Any], str]] = [
    ("vae/config.json", {"norm_num_groups": 16}, "VAE: norm_num_groups is 16, and would be 32"),
    ("vae/config.json", {"scaling_factor": 0.18215}, "VAE: scaling_factor is 0.18215"),
    ("vae/config.json", {"shift_factor": None}, "VAE: shift_factor is None"),
    ("vae/config.json", {"act_fn": "relu"}, "VAE: act_fn"),
    ("vae/config.json", {"latents_mean": [0.0] * 4}, "VAE: latents_mean"),
    ("vae/config.json", {"layers_per_block": 10**6}, "VAE: layers_per_block is 1000000"),
    ("vae/config.json", {"something": "new"}, "VAE: something is 'new'"),
    ("scheduler/scheduler_config.json", {"shift": 1.0}, "scheduler: shift is 1.0, and would be 3.0"),
    ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "scheduler: use_karras_sigmas"),
    ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "it is a DDIMScheduler"),
    ("config.json", {"ce_weight": 0.25}, "config.json: ce_weight is 0.25, and would be 1.0"),
    ("config.json", {"loss_reduction": "sample"}, "config.json: loss_reduction"),
    ("config.json", {"image_token_id": 7}, "`image_token_id`"),
    ("config.json", {"text_config": {"rms_norm_eps": 0.5}}, "text_config: rms_norm_eps is 0.5"),
    (
        "config.json",
        {"text_config": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}}},
        "rope",
    ),
    ("config.json", {"vision_config": {"layer_norm_eps": 0.5}}, "vision_config: layer_norm_eps"),
    ("config.json", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    (
        "config.json",
        {"quantization_config": {"quant_method": "torchao", "quant_type": "int8_weight_only"}},
        "quantised",
    ),
    ("chat_template.jinja", {}, "chat template"),
]


def said(source: Path, capsys) -> str:
    back = source.parent / "back"
    assert convert_back([str(source), str(back)]) == 2
    assert not back.exists() and not list(source.parent.glob("*.unfinished"))
    return capsys.readouterr().err


@pytest.fixture
def source(repository, tmp_path) -> Path:
    """A copy of the converted golden checkpoint to change."""
    return Path(shutil.copytree(repository, tmp_path / "source"))


@pytest.mark.parametrize(("name", "changes", "message"), LOST, ids=[f"{name} {list(c)}" for name, c, _ in LOST])
def test_what_would_be_lost_is_named(name, changes, message, source, capsys):
    if name.endswith(".json"):
        settings = json.loads((source / name).read_text())
        for key, value in changes.items():
            settings[key] = settings.get(key, {}) | value if key.endswith("_config") else value
        (source / name).write_text(json.dumps(settings))
    else:
        (source / name).write_text("{{ 'other' }}")
    assert message in said(source, capsys)


def test_everything_that_would_be_lost_is_named_at_once(tmp_path, capsys):
    shutil.copytree(SHAPES, tmp_path / "shapes")
    error = said(tmp_path / "shapes", capsys)
    for name in ("norm_num_groups is 2", "scaling_factor is 1.2916", "shift_factor is -0.0052", "shift is 2.0"):
        assert name in error


@pytest.mark.parametrize("how", ["renamed", "missing", "another shape"])
def test_a_vae_of_other_tensors_is_refused(how, source, capsys):
    file = source / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weight = weights.pop("decoder.mid_block.resnets.0.conv1.bias")
    if how == "renamed":
        weights["decoder.mid_block.resnets.0.conv9.bias"] = weight
    elif how == "another shape":
        weights["decoder.mid_block.resnets.0.conv1.bias"] = weight[1:].clone()
    save_file(weights, file, {"format": "pt"})
    assert "mid_block.resnets.0.conv" in said(source, capsys)


def test_adapters_have_no_place(source, tmp_path, capsys):
    save_peft(tmp_path / "lora")
    shutil.copy(tmp_path / "lora" / "adapter_config.json", source)
    assert "merge_lora.py" in said(source, capsys)


def test_weights_of_integers_have_no_place(source, capsys):
    for file in source.glob("*.safetensors"):
        weights = load_file(file)
        save_file(
            {name: weight.to(torch.int8) if "o_proj" in name else weight for name, weight in weights.items()},
            file,
            {"format": "pt"},
        )
    assert "o_proj" in (error := said(source, capsys)) and "torch.int8" in error


@pytest.mark.parametrize("layout", ["flat", "in parts"])
def test_settings_of_generation_and_of_images_come_back(layout, source, tmp_path, capsys):
    processor = load_processor()
    processor.image_processor.max_pixels = 4321
    pipe = BagelPipeline.from_pretrained(source, processor=processor)
    pipe.transformer.generation_config.update(temperature=0.3, do_sample=True)
    if layout == "flat":
        processor.save_pretrained(source)
        pipe.transformer.generation_config.save_pretrained(source)
    else:
        shutil.rmtree(source)
        pipe.save_pretrained(source)
    assert convert_back([str(source), str(tmp_path / "back")]) == 0
    assert "preprocessor_config.json" in capsys.readouterr().out
    back = BagelProcessor.from_pretrained(tmp_path / "back")
    assert back.image_processor.to_dict() == processor.image_processor.to_dict()
    model = BagelForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert (model.generation_config.temperature, model.generation_config.do_sample) == (0.3, True)
    assert AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab() == processor.tokenizer.get_vocab()
