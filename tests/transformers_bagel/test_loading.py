"""Loading and saving: the original layout, the library's own, modules left out, types, devices, names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.utils import is_torchao_available

from tests.conftest import CHECKPOINT, GOLDEN, load_model, load_processor, max_error
from tests.quantization import torchao_int8
from transformers_bagel import (
    BagelConfig,
    BagelForConditionalGeneration,
    BagelImageProcessor,
    BagelModel,
    BagelProcessor,
    files,
)
from transformers_bagel.checkpoints import module_name
from transformers_bagel.files import find_file


ORIGINAL = load_file(CHECKPOINT / "ema.safetensors")
IDS = torch.tensor([[1, 2, 3, 4]])


def settings(config: BagelConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "architectures")}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_original_layout_loads_whole_and_unchanged():
    model, info = load_model(output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    assert {module_name(name) for name in ORIGINAL} == set(state)
    assert all(torch.equal(state[module_name(name)], tensor) for name, tensor in ORIGINAL.items())


def test_original_json_is_corrected_from_the_weights_and_the_tokenizer():
    config = BagelConfig.from_pretrained(CHECKPOINT)
    assert config.vision_config.num_hidden_layers == 2
    assert config.max_latent_size == 8
    text_config = config.text_config
    assert (text_config.bos_token_id, text_config.eos_token_id, text_config.pad_token_id) == (421, 422, 420)
    for place in (CHECKPOINT, CHECKPOINT / "config.json"):
        assert settings(config) == settings(AutoConfig.from_pretrained(place))
        assert settings(config) == settings(BagelConfig.from_pretrained(place))


def test_generation_stops_and_pads_with_the_tokenizers_tokens(model):
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (421, 422, 420)
    fresh = BagelForConditionalGeneration(model.config).generation_config
    assert (fresh.bos_token_id, fresh.eos_token_id, fresh.pad_token_id) == (421, 422, 420)


def test_a_users_own_stop_tokens_survive(tmp_path):
    model = load_model()
    model.generation_config.eos_token_id = [422, 7]
    model.save_pretrained(tmp_path)
    loaded = BagelForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == [422, 7]


@pytest.mark.parametrize("shard", ["5GB", "300KB"])
def test_saving_keeps_names_and_bits(shard, model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "300KB")
    saved = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            saved |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    assert saved.keys() == ORIGINAL.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in ORIGINAL.items())
    loaded = BagelForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert settings(loaded.config) == settings(model.config)


def test_library_names_load_too(model, tmp_path):
    model.save_pretrained(tmp_path, save_original_format=False)
    assert torch.equal(logits(BagelForConditionalGeneration.from_pretrained(tmp_path)), logits(model))


def test_dtype_and_device_map(model, tmp_path):
    assert load_model(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(logits(load_model(device_map="auto")), logits(model))
    device_map = {"model.language_model": "cpu", "model": "cpu", "lm_head": "disk"}
    mapped = load_model(device_map=device_map, offload_folder=str(tmp_path))
    assert max_error(logits(mapped), logits(model)) <= 1e-6


@pytest.mark.parametrize("left_out", ["visual_gen", "visual_und"])
def test_a_model_loads_without_some_of_its_modules(left_out, model, tmp_path, encode):
    loaded, info = load_model(**{left_out: False}, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model))
    gone = set(model.state_dict()) - set(loaded.state_dict())
    pattern = {
        "visual_gen": "_moe_gen|vae2llm|llm2vae|time_embedder|latent_pos",
        "visual_und": "vision|connector|vit_",
    }
    assert gone == {name for name in model.state_dict() if re.search(pattern[left_out], name)}
    if left_out == "visual_gen":
        inputs = encode(["@wide", "what?"])
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), loaded.generate(**inputs, max_new_tokens=4))
        layers = sum(tensor.numel() for name, tensor in model.state_dict().items() if ".layers." in name)
        kept = sum(tensor.numel() for name, tensor in loaded.state_dict().items() if ".layers." in name)
        assert kept < 0.8 * layers
    loaded.save_pretrained(tmp_path)
    again = BagelForConditionalGeneration.from_pretrained(tmp_path)
    assert set(again.state_dict()) == set(loaded.state_dict())


def test_a_model_without_modules_refuses_what_it_cannot_do(encode):
    inputs = encode(["@wide", "what?"])
    with pytest.raises(ValueError, match="visual_und=True"):
        load_model(visual_und=False)(**inputs)
    step = {
        "latents": torch.zeros(4, 16),
        "latent_grid_hw": torch.tensor([[2, 2]]),
        "timesteps": torch.ones(1),
        "position_ids": torch.zeros(1, dtype=torch.long),
    }
    with pytest.raises(ValueError, match="visual_gen=True"):
        load_model(visual_gen=False)(**step)
    assert load_model(visual_und=False)(**step).velocity.shape == (4, 16)


def test_auto_classes_know_it(tmp_path, model):
    assert isinstance(AutoModelForImageTextToText.from_pretrained(CHECKPOINT), BagelForConditionalGeneration)
    assert isinstance(AutoModelForMultimodalLM.from_pretrained(CHECKPOINT), BagelForConditionalGeneration)
    base = AutoModel.from_pretrained(CHECKPOINT)
    assert isinstance(base, BagelModel)
    assert torch.equal(base.language_model.norm.weight, model.model.language_model.norm.weight)
    load_processor().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, BagelProcessor)
    assert processor.image_processor.size["longest_edge"] == 140
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), BagelImageProcessor)


def test_default_configuration_is_the_original_7b_model():
    expected = json.loads((GOLDEN.parent / "full_size_shapes.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = BagelForConditionalGeneration(BagelConfig())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {module_name(name): shape for name, shape in expected["ema.safetensors"].items()}
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == expected["parameters"]["ema.safetensors"]


def test_original_json_may_be_passed_as_arguments():
    original = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    config = BagelConfig(**original)
    assert config.vision_config.num_hidden_layers == original["vit_config"]["num_hidden_layers"] - 1
    assert config.text_config.model_type == "bagel_text"
    assert config.text_config.rope_parameters["rope_theta"] == 1_000_000.0
    assert (config.latent_channels, config.latent_stride) == (4, 16)


def test_configuration_round_trips(tmp_path):
    config = BagelConfig(text_config={"num_hidden_layers": 2}, interpolate_pos=True, latent_channels=4)
    config.save_pretrained(tmp_path)
    assert BagelConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert BagelConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_other_layers_than_mot_are_refused():
    with pytest.raises(ValueError, match="layer_module"):
        BagelConfig(llm_config={"layer_module": "Qwen2DecoderLayer"})


def test_a_repository_without_config_json_loads(model, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink()
    assert torch.equal(logits(BagelForConditionalGeneration.from_pretrained(folder)), logits(model))
    assert BagelProcessor.from_pretrained(folder).image_processor.patch_size == 14


def test_weights_without_an_index_load(model, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "model.safetensors.index.json").unlink()
    assert torch.equal(logits(BagelForConditionalGeneration.from_pretrained(folder)), logits(model))


def test_position_tables_stay_frozen(model):
    tables = {name for name, _ in model.named_buffers() if name.endswith("pos_embed")}
    assert tables == {"model.latent_pos_embed.pos_embed", "model.vit_pos_embed.pos_embed"}
    assert not any(name.endswith("pos_embed") for name, _ in model.named_parameters())


def test_a_new_model_has_the_original_tables_and_draws_nothing(model):
    fresh = BagelForConditionalGeneration(model.config).model
    for name in ("latent_pos_embed", "vit_pos_embed"):
        assert max_error(getattr(fresh, name).pos_embed, getattr(model.model, name).pos_embed) <= 1e-6
    assert not fresh.llm2vae.weight.any() and not fresh.llm2vae.bias.any()


def test_embeddings_can_be_resized():
    model = load_model()
    before = logits(model)
    model.resize_token_embeddings(460)
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 460
    assert max_error(logits(model)[..., :448], before) <= 1e-6


@pytest.mark.parametrize("left_out", ["visual_gen", "visual_und"])
def test_a_saved_model_without_modules_keeps_original_names_and_does_not_grow_back(left_out, tmp_path):
    load_model(**{left_out: False}).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() < ORIGINAL.keys()
    assert getattr(BagelConfig.from_pretrained(tmp_path), left_out) is False
    with pytest.raises(ValueError, match="lacks"):
        BagelForConditionalGeneration.from_pretrained(tmp_path, **{left_out: True})


def test_a_configuration_without_drawing_says_so_to_its_language_model():
    assert BagelConfig(visual_gen=False).text_config.visual_gen is False


def test_saving_drops_the_name_of_the_original_weights(model, tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "original")
    (tmp_path / "original" / "model.safetensors.index.json").unlink()
    BagelForConditionalGeneration.from_pretrained(tmp_path / "original").save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(BagelForConditionalGeneration.from_pretrained(tmp_path / "saved")), logits(model))


def test_bfloat16_is_saved_and_loaded_as_such(tmp_path):
    model = load_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = BagelForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_offloaded_parts_see_and_draw(model, tmp_path, encode):
    parts = [f"model.{name}" for name, _ in model.model.named_children() if name != "language_model"]
    parts += [f"model.language_model.{name}" for name, _ in model.model.language_model.named_children()]
    cpu = ("model.language_model.embed_tokens", "model.language_model.rotary_emb")
    device_map = {part: "cpu" if part in cpu else "disk" for part in parts} | {"lm_head": "cpu"}
    mapped = load_model(device_map=device_map, offload_folder=str(tmp_path))
    inputs = encode(["@wide", "what?"])
    assert torch.equal(mapped.generate(**inputs, max_new_tokens=4), model.generate(**inputs, max_new_tokens=4))
    step = {
        "latents": torch.ones(4, 16),
        "latent_grid_hw": torch.tensor([[2, 2]]),
        "timesteps": torch.ones(1),
        "position_ids": torch.zeros(1, dtype=torch.long),
    }
    with torch.no_grad():
        assert max_error(mapped(**step).velocity, model(**step).velocity) <= 1e-6


LOADS = {
    "as_it_is": {},
    "cast": {"dtype": torch.bfloat16},
    "understanding": {"visual_gen": False},
    "on_the_disk": {"device_map": {"model": "cpu", "lm_head": "disk"}},
    "placed": {"device_map": "auto"},
}
# The environment of the lower bounds has no quantisers.
if is_torchao_available():
    LOADS["quantized"] = {"quantization_config": torchao_int8()}


@pytest.mark.parametrize("load", LOADS)
def test_a_checkpoint_that_the_system_refuses_to_map_loads(load, tmp_path, monkeypatch):
    expected = logits(load_model(**LOADS[load], offload_folder=str(tmp_path / "mapped")))
    plain_map = torch.UntypedStorage.from_file

    def limited_map(file, *args, **kwargs):
        if Path(file).is_relative_to(CHECKPOINT):
            raise RuntimeError("unable to mmap 29214695632 bytes: Cannot allocate memory (12)")
        return plain_map(file, *args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", limited_map)
    model = load_model(**LOADS[load], offload_folder=str(tmp_path / "read"))
    assert max_error(logits(model), expected) <= 1e-6
    assert model.name_or_path == model.config.name_or_path == str(CHECKPOINT)


class WithNewHead(BagelForConditionalGeneration):
    _keys_to_ignore_on_load_missing = [r"^score\."]

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.Linear(config.text_config.hidden_size, 1)
        self.post_init()


def test_a_subclass_may_have_a_new_head(model):
    loaded, info = WithNewHead.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.score.weight.isfinite().all() and not info["missing_keys"]


def test_a_type_of_another_model_is_refused(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    settings = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(settings | {"model_type": "bagel_mot"}))
    with pytest.raises(ValueError, match="`model_type`.*'bagel_mot'"):
        BagelForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")


def test_weights_that_no_file_gave_are_never_handed_out(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "vae2llm" not in name}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="lacks tensors.*vae2llm"):
        BagelForConditionalGeneration.from_pretrained(tmp_path)


ABSENT = EntryNotFoundError("no such file")
UNREACHABLE = LocalEntryNotFoundError("no connection")


@pytest.fixture
def hub_that_fails(monkeypatch, tmp_path):
    """`fail(error)`: every download fails; in the library's words, if they are asked for."""

    def fail(error: Exception) -> None:
        def download(*args, **kwargs):
            raise error

        def said(*args, **kwargs):
            raise OSError("said by the library")

        monkeypatch.setattr(files, "hf_hub_download", download)
        monkeypatch.setattr(files, "cached_file", said)

    return fail


def test_a_file_that_is_known_to_be_absent_is_absent(hub_that_fails, tmp_path):
    hub_that_fails(ABSENT)
    assert find_file("org/bagel", "vocab.json") is None
    hub_that_fails(UNREACHABLE)
    assert find_file("org/bagel", "vocab.json", local_files_only=True) is None
    commit = "0" * 40
    marker = tmp_path / "models--org--bagel" / ".no_exist" / commit / "vocab.json"
    marker.parent.mkdir(parents=True)
    marker.touch()
    assert find_file("org/bagel", "vocab.json", cache_dir=tmp_path, revision=commit) is None


@pytest.mark.parametrize("error", [UNREACHABLE, OSError("reset")], ids=["unreachable", "broken"])
def test_a_fault_of_the_network_is_no_absent_file(error, hub_that_fails, tmp_path):
    hub_that_fails(error)
    with pytest.raises(OSError, match="said by the library"):
        find_file("org/bagel", "tokenizer.json", cache_dir=tmp_path)


def test_a_second_place_that_is_the_first_keeps_its_revision(hub_that_fails):
    hub_that_fails(ABSENT)
    hub = {"revision": "v1", "subfolder": "part"}
    assert files.place_of("org/bagel", "org/bagel", ("processor_config.json",), hub) == ("org/bagel", hub)


def test_auto_config_of_a_subfolder_is_corrected_by_the_model(model, tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "part")
    config = AutoConfig.from_pretrained(tmp_path, subfolder="part")
    assert config.text_config.bos_token_id == 420
    config.text_config.pad_token_id = 7
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, subfolder="part", config=config)
    assert (loaded.config.text_config.bos_token_id, loaded.generation_config.bos_token_id) == (421, 421)
    assert loaded.config.text_config.pad_token_id == 7
    loaded.config.text_config.pad_token_id = 420
    assert settings(loaded.config) == settings(model.config)
    assert "original_config" not in config.to_dict()
