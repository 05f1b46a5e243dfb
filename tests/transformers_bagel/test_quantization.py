"""Quantised by transformers: what stays as it is, both layouts, text, velocities, files, adapters."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from tests.conftest import CHECKPOINT, load_model, max_error, training_samples
from tests.quantization import (
    QUANTIZATIONS,
    bitsandbytes_int8,
    bitsandbytes_nf4,
    quantized_layers,
    torchao_int8,
)
from transformers_bagel import BagelForConditionalGeneration


IDS = torch.tensor([[1, 2, 3, 4]])
STEP = {
    "latents": torch.randn(4, 16, generator=torch.Generator().manual_seed(0)),
    "latent_grid_hw": torch.tensor([[2, 2]]),
    "timesteps": torch.ones(1),
    "position_ids": torch.zeros(1, dtype=torch.long),
}
# Of the tiny model's random weights; relative to the length of what is compared.
BOUNDS = {torchao_int8: 0.05, bitsandbytes_int8: 0.05, bitsandbytes_nf4: 0.25}


@pytest.fixture(scope="module", params=QUANTIZATIONS, ids=lambda quantize: quantize.__name__)
def quantize(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(quantize) -> BagelForConditionalGeneration:
    return load_model(quantization_config=quantize(), dtype=torch.bfloat16)


@torch.no_grad()
def outputs(model) -> tuple[torch.Tensor, torch.Tensor]:
    return model(input_ids=IDS).logits, model(**STEP).velocity


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


def test_only_the_layers_of_the_experts_and_the_tower_are_quantized(quantize, quantized, model):
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and ".layers." in name
        # What bitsandbytes' kernel for CPUs cannot pack.
        and not (quantize is bitsandbytes_nf4 and (module.in_features % 64 or module.out_features % 32))
    }
    assert quantized_layers(quantized) == expected
    assert {"q_proj", "q_proj_moe_gen"} <= {name.rsplit(".", 1)[-1] for name in expected}
    kept = {name: tensor for name, tensor in quantized.state_dict().items() if name.rpartition(".")[0] not in expected}
    for part in (
        "vae2llm",
        "llm2vae",
        "time_embedder",
        "connector",
        "patch_embedding",
        "norm",
        "pos_embed",
        "lm_head",
    ):
        assert any(part in name for name in kept)
    plain = load_model(dtype=torch.bfloat16).state_dict()
    for name, tensor in kept.items():
        if name in plain:
            assert torch.equal(tensor, plain[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_and_velocities_stay_near_float32(quantize, dtype, model):
    quantized = load_model(quantization_config=quantize(), dtype=dtype)
    for actual, expected in zip(outputs(quantized), outputs(model), strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) <= BOUNDS[quantize]


def test_a_quantized_model_sees_and_talks(quantized, encode):
    inputs = encode(["@wide", "what?"])
    ids = quantized.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 4


def test_experts_stay_apart(quantized):
    plain = outputs(quantized)
    expert = quantized.model.language_model.layers[0].mlp_moe_gen
    handle = expert.register_forward_hook(lambda module, args, output: output + 1)
    logits, velocity = outputs(quantized)
    handle.remove()
    assert torch.equal(logits, plain[0])
    assert not torch.equal(velocity, plain[1])


def test_the_librarys_layout_loads_as_the_original_one(quantize, quantized, model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = BagelForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=quantize(), dtype=torch.bfloat16
    )
    for actual, expected in zip(outputs(loaded), outputs(quantized), strict=True):
        assert torch.equal(actual, expected)


def test_the_base_model_loads_quantized(quantize):
    base = AutoModel.from_pretrained(CHECKPOINT, quantization_config=quantize(), dtype=torch.bfloat16)
    whole = load_model(quantization_config=quantize(), dtype=torch.bfloat16)
    assert {f"model.{name}" for name in quantized_layers(base)} == quantized_layers(whole)


@pytest.mark.parametrize("left_out", ["visual_gen", "visual_und"])
def test_a_model_without_modules_loads_quantized(quantize, left_out, quantized):
    loaded = load_model(quantization_config=quantize(), dtype=torch.bfloat16, **{left_out: False})
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, outputs(quantized)[0])


def test_a_quantized_model_saves_and_loads(quantized, tmp_path):
    expected = outputs(quantized)
    quantized.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith(("language_model.", "vit_model.", "connector.")) for name in names if ".fc" in name)
    assert any(name.startswith("language_model.model.layers.0.mlp_moe_gen.up_proj.") for name in names)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 0.9 * sum(2 * tensor.numel() for tensor in load_file(CHECKPOINT / "ema.safetensors").values())
    loaded = BagelForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert quantized_layers(loaded) == quantized_layers(quantized)
    for actual, before in zip(outputs(loaded), expected, strict=True):
        assert torch.equal(actual, before)


@pytest.mark.parametrize(
    "quantize, argument", [(torchao_int8, "modules_to_not_convert"), (bitsandbytes_int8, "llm_int8_skip_modules")]
)
def test_own_exceptions_come_on_top_of_ours_and_replace_the_librarys(quantize, argument):
    plain = quantized_layers(load_model(quantization_config=quantize()))
    own = quantized_layers(load_model(quantization_config=quantize(**{argument: [".*mlp_moe_gen"]})))
    assert own == {name for name in plain if "mlp_moe_gen" not in name} | {"lm_head"}


def test_the_callers_configuration_stays_as_it_is_and_may_be_a_dict(quantize):
    config = quantize()
    before = config.to_dict()
    model = load_model(quantization_config=config)
    assert config.to_dict() == before
    again = load_model(quantization_config=before)
    assert quantized_layers(again) == quantized_layers(model)


def test_float16_is_the_type_of_all_weights():
    model = load_model(dtype=torch.float16)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_quantized(quantize, tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "ema.safetensors")
    missing = "language_model.model.layers.1.mlp_moe_gen.up_proj.weight"
    del weights[missing]
    save_file(weights, tmp_path / "ema.safetensors")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"][missing]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="mlp_moe_gen.up_proj"):
        BagelForConditionalGeneration.from_pretrained(tmp_path, quantization_config=quantize())


def test_lora_on_a_quantized_model_learns_and_loads(quantize, collate, tmp_path):
    model = load_model(quantization_config=quantize(), dtype=torch.bfloat16)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    batch = collate(generator=torch.Generator().manual_seed(0))(training_samples("chat", "edit"))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    model.train()
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]

    model.eval().save_pretrained(tmp_path)
    loaded = load_model(quantization_config=quantize(), dtype=torch.bfloat16)
    untrained = outputs(loaded)
    loaded.load_adapter(str(tmp_path))
    for actual, expected, before in zip(outputs(loaded), outputs(model), untrained, strict=True):
        assert torch.equal(actual, expected)
        assert max_error(actual, before) > 0.1
    model.disable_adapters()
    for actual, before in zip(outputs(model), untrained, strict=True):
        assert torch.equal(actual, before)
