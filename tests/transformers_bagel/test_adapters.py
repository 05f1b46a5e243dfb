"""Adapters on the model: what LoRA targets, the dtype of its weights, training, and what a save says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file

from diffusers_bagel.loading import load_original_vae
from tests.conftest import CHECKPOINT, golden_image, load_model, max_error
from transformers_bagel import (
    LORA_TARGETS,
    BagelDataCollator,
    BagelForConditionalGeneration,
    BagelModel,
    BagelPreTrainedModel,
    BagelTextModel,
)


VARIANTS: dict[str, dict] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.fixture(scope="module")
def batches(processor) -> dict[str, dict]:
    collate = BagelDataCollator(
        processor, vae=load_original_vae(CHECKPOINT), text_dropout=0, vit_dropout=0, vae_dropout=0
    )
    torch.manual_seed(0)
    question = {"role": "user", "content": "what is this?"}
    drawing = {"role": "assistant", "content": [{"type": "image", "image": golden_image("square")}]}
    answer = {"role": "assistant", "content": "a circle"}
    return {
        "drawing": dict(collate([{"messages": [question, drawing]}])),
        "text": dict(collate([{"messages": [question, answer]}])),
    }


def lora_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


def adapted_model(config: LoraConfig | None = None, adapter_name: str = "default", **kwargs):
    """A model whose adapter, float32 random numbers, changes its outputs a lot."""
    model = load_model(**kwargs)
    model.add_adapter(config or LoraConfig(r=4, lora_alpha=12), adapter_name)
    randomise(model)
    return model


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in lora_weights(model).items():
        numbers = torch.randn(weight.shape, generator=generator)
        weight.data = weight.data * (1 + 0.3 * numbers) if "magnitude" in name else 0.2 * numbers


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


# Targets


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("root", ["full", "model", "text"])
@pytest.mark.parametrize("name", ["gen", "und", "both"])
def test_target_patterns_match_their_expert_in_every_root(model, name, root, prefix):
    roots = {"full": model, "model": model.model, "text": model.model.language_model}
    suffixes = {"gen": ["_moe_gen"], "und": [""], "both": ["", "_moe_gen"]}[name]
    expected = {
        f"{part}{suffix}{projection}"
        for suffix in suffixes
        for part, projection in (
            *((f"self_attn.{letter}_proj", "") for letter in "qkvo"),
            *(("mlp", f".{kind}_proj") for kind in ("gate", "up", "down")),
        )
    }
    matched = [
        module for module, _ in roots[root].named_modules() if re.fullmatch(LORA_TARGETS[name], prefix + module)
    ]
    layers = model.config.text_config.num_hidden_layers
    assert len(matched) == layers * len(expected)
    assert {module.split("layers.")[1].split(".", 1)[1] for module in matched} == expected


@pytest.mark.parametrize("name", LORA_TARGETS)
def test_vision_tower_is_never_targeted(model, name):
    tower = model.model.vision_tower
    names = [f"{prefix}{module}" for module, _ in tower.named_modules() for prefix in ("", "model.vision_tower.")]
    assert any(module.endswith("q_proj") for module in names)
    assert not any(re.fullmatch(LORA_TARGETS[name], module) for module in names)


@pytest.mark.parametrize("part", ["full", "model", "text"])
def test_get_peft_model_needs_no_target_modules(part):
    model = load_model()
    part = {"full": model, "model": model.model, "text": model.model.language_model}[part]
    assert isinstance(part, (BagelForConditionalGeneration, BagelModel, BagelTextModel))
    targeted = get_peft_model(part, LoraConfig()).targeted_module_names
    assert len(targeted) == 14 * model.config.text_config.num_hidden_layers
    assert not any("vision" in name for name in targeted)


def test_targets_are_registered_for_both_model_types():
    for model_type in ("bagel", "bagel_text"):
        assert TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type] == LORA_TARGETS["both"]


def test_package_imports_without_peft():
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.split(".")[0] == "peft" else find(name, *args)
sys.modules["peft"] = None
import diffusers_bagel, transformers_bagel
assert transformers_bagel.LORA_TARGETS["gen"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Float32 masters


@pytest.mark.parametrize("variant", VARIANTS)
def test_masters_are_float32_on_a_bfloat16_model(variant, tmp_path):
    model = adapted_model(LoraConfig(**VARIANTS[variant]), dtype=torch.bfloat16)
    wrapped = get_peft_model(load_model(dtype=torch.bfloat16), LoraConfig(**VARIANTS[variant]))
    model.save_pretrained(tmp_path)
    loaded = load_model(dtype=torch.bfloat16)
    loaded.load_adapter(tmp_path)
    from_folder = BagelForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for adapted in (model, wrapped, loaded, from_folder):
        weights = lora_weights(adapted)
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        others = {weight.dtype for name, weight in adapted.named_parameters() if name not in weights}
        assert others == {torch.bfloat16}
    for name, weight in lora_weights(model).items():
        assert torch.equal(lora_weights(loaded)[name], weight)
        assert torch.equal(lora_weights(from_folder)[name], weight)


def test_float32_masters_keep_small_updates_that_bfloat16_loses(batches):
    model = adapted_model(dtype=torch.bfloat16)
    before = {name: weight.detach().clone() for name, weight in lora_weights(model).items()}
    model.train()
    model(**batches["drawing"]).loss.backward()
    torch.optim.SGD(lora_weights(model).values(), lr=1e-5).step()
    changed = [name for name, weight in lora_weights(model).items() if not torch.equal(weight, before[name])]
    assert changed
    assert any(torch.equal(before[name].bfloat16(), lora_weights(model)[name].bfloat16()) for name in changed)


def test_dropout_of_a_new_adapter_rests_while_the_model_does():
    model = adapted_model(LoraConfig(lora_dropout=0.5))
    assert torch.equal(outputs(model), outputs(model))


# Training


@pytest.mark.parametrize("how", ["add_adapter", "get_peft_model"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss(variant, how, batches):
    model = load_model()
    if how == "add_adapter":
        model.add_adapter(LoraConfig(**VARIANTS[variant]))
    else:
        model = get_peft_model(model, LoraConfig(**VARIANTS[variant]))
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(trained) == len(lora_weights(model))
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batches["drawing"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_gradients_reach_every_adapter_even_without_anything_to_draw(batches):
    model = adapted_model(LoraConfig(target_modules=LORA_TARGETS["both"]))
    model.train()
    model(**batches["text"]).loss.backward()
    for name, weight in lora_weights(model).items():
        assert weight.grad is not None, name
    model.zero_grad()
    model(**batches["drawing"]).loss.backward()
    assert all(weight.grad.abs().max() > 0 for name, weight in lora_weights(model).items() if "v_proj_moe_gen" in name)


# Saving and loading


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_adapter_gives_the_same_outputs_by_every_road(variant, tmp_path):
    model = adapted_model(LoraConfig(**VARIANTS[variant]))
    expected = outputs(model)
    assert max_error(expected, outputs(load_model())) > 0.1
    model.save_pretrained(tmp_path)
    loaded = load_model()
    loaded.load_adapter(tmp_path)
    assert torch.equal(outputs(loaded), expected)
    assert torch.equal(outputs(BagelForConditionalGeneration.from_pretrained(tmp_path)), expected)
    assert torch.equal(outputs(PeftModel.from_pretrained(load_model(), tmp_path)), expected)


def test_saving_an_adapter_says_that_the_base_model_is_left_out(tmp_path, caplog):
    adapted_model().save_pretrained(tmp_path)
    assert "Only the adapter 'default' is saved" in caplog.text
    assert str(CHECKPOINT) in caplog.text
    assert not (tmp_path / "model.safetensors").exists()


def test_saving_one_of_two_adapters_names_the_other(tmp_path, caplog):
    model = adapted_model()
    model.add_adapter(LoraConfig(), "second")
    randomise(model, seed=1)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    assert "the adapter 'default'" in caplog.text
    assert torch.equal(outputs(BagelForConditionalGeneration.from_pretrained(tmp_path)), expected)


def test_saving_several_active_adapters_is_refused_before_anything_is_written(tmp_path):
    model = adapted_model()
    model.add_adapter(LoraConfig(), "second")
    model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="default, second"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saving_a_disabled_adapter_says_that_it_will_be_enabled(tmp_path, caplog):
    model = adapted_model()
    model.disable_adapters()
    model.save_pretrained(tmp_path)
    assert "disabled" in caplog.text


def test_saved_adapter_keeps_the_strength_it_was_given(tmp_path):
    model = adapted_model(LoraConfig(r=4, lora_alpha=12, use_rslora=True, rank_pattern={"q_proj": 2}))
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].lora_alpha == 12
    assert max_error(outputs(BagelForConditionalGeneration.from_pretrained(tmp_path)), expected) <= 1e-5


def test_base_of_a_peft_model_is_not_saved_and_nothing_is_written(tmp_path):
    model = get_peft_model(load_model(), LoraConfig(modules_to_save=["lm_head"]))
    randomise(model)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data *= 1.5
    expected = outputs(model)
    with pytest.raises(ValueError, match=r"PeftModel.*`merge_and_unload\(\)`"):
        model.get_base_model().save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.merge_and_unload().save_pretrained(tmp_path / "out")
    assert max_error(outputs(BagelForConditionalGeneration.from_pretrained(tmp_path / "out")), expected) <= 1e-5


def test_deleting_one_of_two_adapters_keeps_the_other():
    model = adapted_model()
    expected = outputs(model)
    model.add_adapter(LoraConfig(target_modules=LORA_TARGETS["gen"]), "second")
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("how", ["tensors", "folder", "automatic"])
def test_hotswap_swaps_alpha_and_keeps_the_parameters(how, tmp_path):
    model, other = adapted_model(LoraConfig(r=4, lora_alpha=12)), adapted_model(LoraConfig(r=4, lora_alpha=6))
    randomise(other, seed=1)
    expected = outputs(other)
    model.save_pretrained(tmp_path / "first")
    other.save_pretrained(tmp_path / "second")
    model = load_model()
    if how == "automatic":
        model.enable_peft_hotswap(target_rank=6)
    model.load_adapter(tmp_path / "first")
    before = lora_weights(model)
    if how == "tensors":
        weights = get_peft_model_state_dict(other)
        model.load_adapter(adapter_state_dict=weights, peft_config=other.peft_config["default"], hotswap=True)
    else:
        model.load_adapter(tmp_path / "second", **({"hotswap": True} if how == "folder" else {}))
    assert all(weight is before[name] for name, weight in lora_weights(model).items())
    assert max_error(outputs(model), expected) <= 1e-5


def test_loaded_weights_lie_where_the_device_map_has_their_layer():
    # "meta" stands for a second device: nothing is computed.
    other, model = adapted_model(), load_model()
    model.model.language_model.layers[1].to("meta")
    model.hf_device_map = {f"model.language_model.layers.{i}": "meta" if i == 1 else "cpu" for i in range(3)}
    weights = get_peft_model_state_dict(other)
    model.load_adapter(adapter_state_dict=weights, peft_config=other.peft_config["default"])
    for name, weight in lora_weights(model).items():
        assert weight.device.type == ("meta" if ".layers.1." in name else "cpu"), name


def test_hotswap_of_an_unknown_adapter_is_refused(tmp_path):
    adapted_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="existing adapter"):
        load_model().load_adapter(tmp_path, hotswap=True)


def test_model_without_its_deleted_adapter_is_saved_whole(tmp_path):
    model = adapted_model()
    model.delete_adapter("default")
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert not any("base_layer" in name for name in names)
    assert torch.equal(outputs(BagelForConditionalGeneration.from_pretrained(tmp_path)), outputs(load_model()))


def test_every_class_has_the_adapter_methods():
    assert BagelPreTrainedModel.add_adapter.__module__ == "transformers_bagel.adapters"
