"""The pipeline from the original layout, with the arguments of diffusers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from safetensors.torch import load_file, save_file

from diffusers_bagel import BagelPipeline, loading
from diffusers_bagel.__main__ import main
from diffusers_bagel.loading import load_original_vae
from tests.conftest import CHECKPOINT, GOLDEN
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


SHAPES = Path(__file__).parents[2] / "examples" / "shapes" / "checkpoint"


@pytest.fixture
def shapes(tmp_path) -> Path:
    """A copy of a repository in diffusers' layout, to spoil."""
    return Path(shutil.copytree(SHAPES, tmp_path / "shapes"))


def spoil(file: Path, **settings: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | settings), encoding="utf-8")


SPOILT = {
    "layers": ("vae/config.json", {"layers_per_block": 10**6}, "`layers_per_block` in .*config.json"),
    "layers_as_text": ("vae/config.json", {"layers_per_block": "x"}, "`layers_per_block`"),
    "levels": ("vae/config.json", {"down_block_types": ["DownEncoderBlock2D"] * 10**5}, "`down_block_types`"),
    "widths": ("vae/config.json", {"block_out_channels": 5}, "`block_out_channels`"),
    "absurd_width": ("vae/config.json", {"latent_channels": 10**30}, r"vae/config\.json"),
    "block_type": ("vae/config.json", {"up_block_types": ["Nonsense"] * 4}, r"vae/config\.json"),
    "scaling": ("vae/config.json", {"scaling_factor": "x"}, "`scaling_factor`"),
    "groups": ("vae/config.json", {"norm_num_groups": 0}, r"vae/config\.json"),
    "steps": ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "`num_train_timesteps`"),
    "steps_as_text": ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}, "`num_train_timesteps`"),
    "component": ("model_index.json", {"transformer": 5}, "`transformer` in .*model_index.json"),
    "component_of_one_word": ("model_index.json", {"vae": ["diffusers"]}, "`vae` in .*model_index.json"),
    "token": ("config.json", {"vision_start_token_id": 0}, r"`vision_start_token_id` in .*config\.json"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_settings_that_cannot_be_right_are_named_before_weights_are_read(case, shapes, monkeypatch):
    file, settings, message = SPOILT[case]
    spoil(shapes / file, **settings)
    monkeypatch.setattr(loading, "check_values", lambda *args: pytest.fail("read"))
    with pytest.raises(ValueError, match=message):
        BagelPipeline.from_pretrained(shapes)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": NaN}'])
@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_broken_json_is_named(file, content, shapes):
    (shapes / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file}' (cannot be read|must hold)"):
        BagelPipeline.from_pretrained(shapes)


@pytest.mark.parametrize("file", ["vae/config.json", "vae/diffusion_pytorch_model.safetensors", "scheduler/x", "x"])
def test_a_pipe_in_any_folder_is_refused_and_not_waited_for(file, shapes):
    (shapes / file).unlink(missing_ok=True)
    os.mkfifo(shapes / file)
    with pytest.raises(OSError, match=f"{file}' is a pipe or a device"):
        BagelPipeline.from_pretrained(shapes)


@pytest.mark.parametrize("spoilt", ["not_finite", "integers"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_vae_of_other_numbers_is_refused(layout, spoilt, shapes, tmp_path):
    folder = shapes if layout == "diffusers" else Path(shutil.copytree(CHECKPOINT, tmp_path / "original"))
    file = folder / ("vae/diffusion_pytorch_model.safetensors" if layout == "diffusers" else "ae.safetensors")
    weights = load_file(file)
    name = "decoder.conv_in.bias"
    weights[name] = weights[name] * torch.nan if spoilt == "not_finite" else weights[name].to(torch.int32)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        BagelPipeline.from_pretrained(folder)


def test_what_is_downloaded_is_checked_like_a_folder(shapes, monkeypatch):
    weights = load_file(shapes / "vae" / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_in.bias"]
    save_file(weights, shapes / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(DiffusionPipeline, "download", classmethod(lambda cls, *args, **kwargs: str(shapes)))
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias is missing"):
        BagelPipeline.download("org/bagel")
    assert BagelPipeline.download("org/bagel", vae=None) == str(shapes)


def test_the_parts_of_a_saved_pipeline_are_compared_with_each_other(tmp_path):
    BagelPipeline.from_pretrained(SHAPES).save_pretrained(tmp_path)
    spoil(tmp_path / "transformer" / "config.json", vision_end_token_id=0)
    with pytest.raises(ValueError, match=r"`vision_end_token_id` in '.*transformer/config\.json' is 0"):
        BagelPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("word", ["bagel_mot", "qwen2"])
def test_the_command_line_refuses_another_model_type(word, shapes, capsys):
    spoil(shapes / "config.json", model_type=word)
    with pytest.raises(ValueError, match=rf"`model_type` .*config\.json.* is '{word}'"):
        BagelPipeline.from_pretrained(shapes)
    picture = str(GOLDEN / "inputs" / "wide.png")
    assert main(["ask", picture, "what?", "--model", str(shapes)]) == 2
    error = capsys.readouterr().err
    assert "config.json" in error and "`model_type`" in error and word in error


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    """diffusers' layout in bfloat16."""
    folder = tmp_path_factory.mktemp("parts") / "pipeline"
    BagelPipeline.from_pretrained(CHECKPOINT, dtype=BF16).save_pretrained(folder)
    return folder


SAVED_DTYPES = {
    "name": ({"dtype": "float32"}, F32, F32),
    "old_name": ({"torch_dtype": "bfloat16"}, BF16, BF16),
    "of_the_files": ({"dtype": "auto"}, BF16, BF16),
    "each": ({"dtype": {"transformer": "bfloat16", "default": "float32"}}, BF16, F32),
    "all_but_one": ({"dtype": {"": "bfloat16", "vae": F32}}, BF16, F32),
}


@pytest.mark.parametrize("given", SAVED_DTYPES)
def test_components_of_diffusers_layout_have_the_type_that_is_asked_for(given, in_parts):
    """The library takes types by their name for a mistake, and loads float32."""
    kwargs, transformer, vae = SAVED_DTYPES[given]
    pipe = BagelPipeline.from_pretrained(in_parts, **kwargs)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (transformer, vae)
    with pytest.raises(ValueError, match="`dtype` must be a floating type"):
        BagelPipeline.from_pretrained(in_parts, dtype="bf16")


@pytest.fixture
def tuned(tmp_path):
    """A folder with weights alone, under a name of their own, whose velocities are not those of the golden checkpoint."""
    folder = tmp_path / "TwiFF-7B"
    folder.mkdir()
    weights = load_file(CHECKPOINT / "ema.safetensors")
    save_file(weights | {"llm2vae.weight": weights["llm2vae.weight"] * 2}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("layout", ["original", "converted"])
def test_a_pipeline_of_weights_alone_takes_the_rest_from_a_base(layout, as_file, tuned, tmp_path):
    base = CHECKPOINT
    original = BagelPipeline.from_pretrained(CHECKPOINT)
    if layout == "converted":
        base = tmp_path / "base"
        original.transformer.save_pretrained(base)
        original.processor.save_pretrained(base)
        original.vae.save_pretrained(base / "vae")
    pipe = BagelPipeline.from_pretrained(tuned / "model.safetensors" if as_file else tuned, base=base)
    assert torch.equal(pipe.transformer.model.llm2vae.weight, original.transformer.model.llm2vae.weight * 2)
    assert all(
        torch.equal(one, other) for one, other in zip(pipe.vae.parameters(), original.vae.parameters(), strict=True)
    )
    assert pipe.scheduler.config.shift == 3.0
    assert pipe.processor.image_processor.vae_size["longest_edge"] == 512
    with pytest.raises(OSError, match="pass `base=`"):
        BagelPipeline.from_pretrained(tuned)


def test_a_pipeline_reads_the_weights_that_are_named(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    weights = load_file(CHECKPOINT / "ema.safetensors")
    for name, factor in (("rvr.safetensors", 2), ("model.fp16.safetensors", 3)):
        save_file(weights | {"llm2vae.bias": weights["llm2vae.bias"] * factor}, tmp_path / name)
    for kwargs, factor in (({"transformers_weights": "rvr.safetensors"}, 2), ({"variant": "fp16"}, 3)):
        pipe = BagelPipeline.from_pretrained(tmp_path, **kwargs)
        assert torch.equal(pipe.transformer.model.llm2vae.bias, weights["llm2vae.bias"] * factor)


@pytest.mark.parametrize("kind", ["a_lora", "a_vae"])
def test_what_is_no_pipeline_is_called_by_its_name(kind, tmp_path):
    if kind == "a_lora":
        save_file(
            {"transformer.lm_head.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors"
        )
    else:
        shutil.copy(CHECKPOINT / "ae.safetensors", tmp_path)
    with pytest.raises(OSError, match={"a_lora": "it is a LoRA", "a_vae": "it holds a VAE alone"}[kind]):
        BagelPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["folder", "file", "named"])
def test_a_model_offered_as_a_lora_is_refused_before_it_is_read(place, pipe, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load_file", lambda *args, **kwargs: pytest.fail("read"))
    path = CHECKPOINT / "ema.safetensors" if place == "file" else CHECKPOINT
    kwargs = {"weight_name": "ema.safetensors"} if place == "named" else {}
    with pytest.raises(ValueError, match="is a model, and no LoRA: pass it to `from_pretrained`"):
        pipe.load_lora_weights(str(path), **kwargs)


# A file in the folder of a component is no pipeline.
@pytest.mark.parametrize(
    ("layout", "door"),
    [
        *(("flat", door) for door in ("path", "transformers_weights", "gguf_file")),
        *(("apart", door) for door in ("transformers_weights", "gguf_file")),
    ],
)
def test_weights_that_are_named_are_read_in_diffusers_layout_too(layout, door, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    part = tmp_path / "transformer"
    if layout == "flat":
        for file in part.iterdir():
            shutil.move(file, tmp_path)
        part.rmdir()
        part = tmp_path
    weights = load_file(CHECKPOINT / "ema.safetensors")
    save_file(
        weights | {"llm2vae.bias": weights["llm2vae.bias"] * 2, "extra": torch.zeros(2)}, part / "rvr.safetensors"
    )
    if door == "gguf_file":
        with pytest.raises(OSError, match="absent.gguf"):
            BagelPipeline.from_pretrained(tmp_path, gguf_file="absent.gguf")
        return
    path = tmp_path / "rvr.safetensors" if door == "path" else tmp_path
    kwargs = {} if door == "path" else {"transformers_weights": "rvr.safetensors"}
    with pytest.raises(ValueError, match="unknown tensor.*extra"):
        BagelPipeline.from_pretrained(path, **kwargs)
    found = BagelPipeline.from_pretrained(path, dtype=F32, ignore_unexpected_keys=True, **kwargs)
    assert torch.equal(found.transformer.model.llm2vae.bias, weights["llm2vae.bias"] * 2)
    with pytest.raises(ValueError, match="`transformers_weights` and `device_map`.*`transformer=`"):
        BagelPipeline.from_pretrained(tmp_path, transformers_weights="rvr.safetensors", device_map="balanced")


def test_a_pickled_lora_that_is_named_is_left_to_the_library(pipe, tmp_path):
    torch.save({"transformer.lm_head.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="lora_B"):
        pipe.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.bin")
