"""Methods of peft beside LoRA, with the layers that they adapt when nobody names any."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.conftest import load_model, training_samples


METHODS = {
    "AdaLora": {"total_step": 10},
    "Lora": {},
    **dict.fromkeys(("Delora", "FourierFT", "HRA", "Hira", "IA3", "LNTuning", "LoHa", "LoKr", "Miss"), {}),
    **dict.fromkeys(("OFT", "Pvera", "RandLora", "Vera"), {}),
}
# These keep something for all layers together, which the library's `load_adapter` does not know of.
SHARED = ("Pvera", "RandLora", "Vera")


def config_of(method: str) -> peft.PeftConfig:
    return getattr(peft, f"{method}Config")(**METHODS[method])


@pytest.fixture
def batch(collate):
    return collate(generator=torch.Generator().manual_seed(0))(training_samples("look", "draw"))


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model, batch) -> torch.Tensor:
    """Two steps, since many adapters begin with a matrix of zeros. Returns the logits afterwards."""
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    return logits(model, batch)


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch, skip_logits=False).logits


@pytest.mark.parametrize("method", METHODS)
def test_every_method_adapts_both_experts_and_not_the_vision_tower(method, batch):
    model = get_peft_model(load_model(), config_of(method))
    names = trainable(model)
    assert any("_moe_gen" in name for name in names)
    assert any("_moe_gen" not in name for name in names)
    assert not any("vision_tower" in name for name in names)
    model.train()(**batch).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == names


@pytest.mark.parametrize("method", [method for method in METHODS if method not in (*SHARED, "LNTuning", "Lora")])
def test_every_method_is_saved_and_loaded(method, batch, tmp_path):
    model = get_peft_model(load_model(), config_of(method))
    expected = train(model, batch)
    assert not torch.equal(expected, logits(load_model(), batch))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load_model(), tmp_path), batch), expected)
    loaded = load_model()
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded, batch), expected)


@pytest.mark.parametrize(("first", "second"), [("Lora", "LoHa"), ("LoKr", "Lora")])
def test_methods_are_mixed(first, second, batch):
    """peft asks for a list where it mixes, and not for a pattern."""
    model = get_peft_model(load_model(), config_of(first), mixed=True)
    model.add_adapter("other", config_of(second))
    model.set_adapter(["default", "other"])
    # Both adapt what LoRA does: four layers of the attention and three of the MLP, of two experts in three layers.
    adapted = {name: {part.rpartition(f".{name}")[0] for part in trainable(model)} for name in ("default", "other")}
    layers = {
        name: {part.rpartition(".")[0].removesuffix(".base_layer") for part in parts if part}
        for name, parts in adapted.items()
    }
    assert len(layers["default"]) == len(layers["other"]) == 42
    assert not any("vision_tower" in name for name in layers["default"] | layers["other"])
    model.train()(**batch).loss.backward()


@pytest.mark.parametrize("method", ["PromptTuning", "PromptEncoder", "PrefixTuning"])
def test_prompts_are_tuned(method, processor):
    config = getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(load_model(), config)
    inputs = processor.tokenizer("hello there", return_tensors="pt")
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert model.eval().generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
