"""What an adapter must hold: whatever is wrong with one is refused by every door, and the model stays as it was."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, load_model, load_processor, max_error
from tests.transformers_bagel.test_adapters import adapted_model, lora_weights, outputs, randomise
from tests.transformers_bagel.test_patterns import BOMBS
from transformers_bagel import LORA_TARGETS, BagelForConditionalGeneration


ROOT = "base_model.model.model.language_model.layers."
FIRST = f"{ROOT}0.self_attn.q_proj."
Weights = dict[str, torch.Tensor]


def without(weights: Weights, *parts: str) -> Weights:
    return {name: weight for name, weight in weights.items() if not any(part in name for part in parts)}


def magnitudes(weights: Weights) -> Weights:
    return {
        name.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(weight.shape[0])
        for name, weight in weights.items()
        if "lora_B" in name
    }


def nan_in(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    weight[-1, -1] = float("nan")
    return weight


# Weights of a LoRA on both experts, changed, and what the error says.
SPOILT: dict[str, tuple[Any, str]] = {
    "half of the pairs": (
        lambda weights: {name: weights[name] for name in sorted(weights)[: len(weights) // 2]},
        r"layers\.1\.\S+ and \d+ more are missing",
    ),
    "every second pair": (lambda weights: without(weights, "k_proj", "o_proj", "up_proj"), r"k_proj.* missing"),
    "one expert": (lambda weights: without(weights, "_moe_gen"), r"_moe_gen.* missing.*allow_missing_layers=True"),
    "half of a pair": (
        lambda weights: without(weights, "0.self_attn.q_proj.lora_B"),
        r"lacks .*q_proj\.lora_B\.weight",
    ),
    "a stray tensor": (
        lambda weights: weights | {f"{FIRST}lora_C.weight": torch.ones(2)},
        r"holds .*q_proj\.lora_C\.weight",
    ),
    "a layer of another model": (
        lambda weights: weights
        | {f"{ROOT}77.mlp.up_proj.lora_{part}.weight": torch.ones(4, 4) for part in ("A", "B")},
        r"holds .*layers\.77\.mlp\.up_proj",
    ),
    "a layer that is not named": (
        lambda weights: weights
        | {
            "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64),
            "base_model.model.lm_head.lora_B.weight": torch.ones(448, 4),
        },
        r"holds lm_head\.lora_A",
    ),
    "magnitudes without use_dora": (lambda weights: weights | magnitudes(weights), r"holds .*lora_magnitude_vector"),
    "another shape": (lambda weights: weights | {f"{FIRST}lora_A.weight": torch.ones(4, 63)}, r"is \(4, 63\)"),
    "integers": (
        lambda weights: weights | {f"{FIRST}lora_A.weight": torch.ones(4, 64, dtype=torch.int32)},
        "floating numbers",
    ),
    "NaN": (lambda weights: weights | {f"{FIRST}lora_A.weight": nan_in(weights[f"{FIRST}lora_A.weight"])}, "NaN"),
    "infinity": (lambda weights: weights | {f"{FIRST}lora_B.weight": torch.full((64, 4), torch.inf)}, "infinity"),
    "a tensor twice": (
        lambda weights: weights
        | {f"{FIRST}lora_A.weight".replace("model.language_model", "language_model.model"): torch.ones(4, 64)},
        "twice",
    ),
}
# Settings of the same LoRA.
WRONG_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "use_dora without magnitudes": ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
    "lora_bias without biases": ({"lora_bias": True}, r"lacks .*lora_B\.bias"),
    "another rank": ({"r": 8}, r"lora_A\.weight is \(4, 64\), expected \(8, 64\)"),
    "a rank of a billion": ({"r": 10**9}, r"expected \(1000000000, 64\)"),
    "a rank in words": ({"r": "four"}, "`r`.*positive integer.*'four'"),
    "no rank": ({"r": 0}, "`r`.*positive integer"),
    "NaN for alpha": ({"lora_alpha": float("nan")}, "`lora_alpha`.*nan|adapter_config.*NaN is no number"),
    "an infinite alpha": (
        {"alpha_pattern": {"q_proj": float("inf")}},
        "`alpha_pattern`|adapter_config.*Infinity is no number",
    ),
    "a huge alpha": ({"lora_alpha": 1e30}, "`lora_alpha`"),
    "no alpha": ({"lora_alpha": None}, "`lora_alpha`"),
    "no ranks": ({"rank_pattern": None}, "`rank_pattern`"),
    "true for alpha": ({"lora_alpha": True}, "`lora_alpha`"),
    "a list of ranks": ({"rank_pattern": [4]}, "`rank_pattern`"),
    "a million ranks": ({"rank_pattern": {f"layer{i}": 4 for i in range(1_000_000)}}, "`rank_pattern`"),
    "a million targets": ({"target_modules": [f"layer{i}" for i in range(1_000_000)]}, "`target_modules`"),
    "a number for the tokens": ({"trainable_token_indices": 3}, "settings"),
    "a number for the biases": ({"bias": 17}, "settings"),
    "a flag for the parameters": ({"target_parameters": True}, "settings"),
    "a number as target": ({"target_modules": [1]}, "`target_modules`"),
    "a pattern for whole modules": ({"modules_to_save": ["(a+)+$"]}, "`modules_to_save`"),
    "a pattern for the list of layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "(l+)+"},
        "`layers_pattern`",
    ),
    "more layers": ({"layer_replication": [[0, 10**6]]}, "`layer_replication`"),
    "code to import": ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "`megatron_config`"),
    "an unknown kind": ({"peft_type": "NOTHING"}, "NOTHING"),
    "words for a switch": ({"use_rslora": "no"}, "`use_rslora`"),
}


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """On both experts, of rank 4, in peft's format."""
    folder = tmp_path_factory.mktemp("lora")
    adapted_model().save_pretrained(folder)
    return folder


def changed_lora(lora: Path, folder: Path, weights: Any = None, settings: dict[str, Any] | None = None) -> Path:
    """A copy of a LoRA; `weights` is a function of its tensors, `settings` are put over its own."""
    shutil.copytree(lora, folder)
    file, description = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if weights is not None:
        save_file(weights(load_file(file)), file)
    description.write_text(json.dumps(json.loads(description.read_text()) | (settings or {})))
    return folder


def with_metadata(lora: Path, folder: Path) -> Path:
    """The same in diffusers' format."""
    folder.mkdir()
    weights = load_file(lora / "adapter_model.safetensors")
    settings = json.loads((lora / "adapter_config.json").read_text())
    save_file(
        {name.replace("base_model.model.", "transformer."): weight for name, weight in weights.items()},
        folder / "pytorch_lora_weights.safetensors",
        {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})},
    )
    return folder


def state_of(model) -> list[tuple]:
    return [(name, id(weight), weight.requires_grad) for name, weight in model.named_parameters()]


@pytest.fixture(scope="module")
def plain() -> BagelForConditionalGeneration:
    return load_model()


@pytest.fixture(scope="module")
def pipe(plain) -> BagelPipeline:
    return BagelPipeline.from_pretrained(CHECKPOINT, transformer=plain, processor=load_processor())


def refused(pipe: BagelPipeline, folder: Path, message: str, tmp_path: Path) -> None:
    model, before = pipe.transformer, state_of(pipe.transformer)
    doors = {
        "model": lambda: model.load_adapter(folder),
        "pipeline": lambda: pipe.load_lora_weights(folder),
        "pipeline, diffusers' format": lambda: pipe.load_lora_weights(with_metadata(folder, tmp_path / "other")),
    }
    for door, load in doors.items():
        with pytest.raises(ValueError, match=message) as error:
            load()
        assert state_of(model) == before and not hasattr(model, "peft_config"), door
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("what", SPOILT)
def test_weights_that_are_not_right_are_refused_by_every_door(what, lora, pipe, tmp_path):
    change, message = SPOILT[what]
    refused(pipe, changed_lora(lora, tmp_path / "lora", change), message, tmp_path)


@pytest.mark.parametrize("what", WRONG_SETTINGS)
def test_settings_that_are_not_right_are_refused_by_every_door(what, lora, pipe, tmp_path):
    settings, message = WRONG_SETTINGS[what]
    refused(pipe, changed_lora(lora, tmp_path / "lora", settings=settings), message, tmp_path)


@pytest.mark.parametrize("what", ["half of the pairs", "NaN"])
def test_a_repository_with_a_broken_adapter_is_not_loaded(what, lora, tmp_path):
    change, message = SPOILT[what]
    with pytest.raises(ValueError, match=message):
        BagelForConditionalGeneration.from_pretrained(changed_lora(lora, tmp_path / "lora", change))


def test_a_hot_swap_puts_nothing_broken_into_the_model(lora, tmp_path):
    model = load_model()
    model.load_adapter(lora)
    expected = outputs(model)
    for what in ("half of the pairs", "NaN"):
        change, message = SPOILT[what]
        with pytest.raises(ValueError, match=message):
            model.load_adapter(changed_lora(lora, tmp_path / what, change), hotswap=True)
    assert torch.equal(outputs(model), expected)


def test_files_that_are_missing_or_broken_are_named(lora, pipe, tmp_path):
    model = pipe.transformer
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        folder = changed_lora(lora, tmp_path / f"no {name}")
        (folder / name).unlink()
        with pytest.raises(OSError, match=name):
            model.load_adapter(folder)
    whole = (lora / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(OSError, match="truncated"):
        model.load_adapter(folder)
    for content in ("{", "[]", "[" * 100_000):
        folder = changed_lora(lora, tmp_path / f"json {len(content)}")
        (folder / "adapter_config.json").write_text(content)
        for load in (model.load_adapter, pipe.load_lora_weights):
            with pytest.raises(ValueError, match="JSON"):
                load(folder)


# Patterns


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("bomb", BOMBS[:4], ids=range(4))
def test_patterns_of_files_end(bomb, key, lora, pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_bagel.patterns.MOST_STEPS", 100_000)
    value = {bomb: 4} if key.endswith("_pattern") else bomb
    folder = changed_lora(lora, tmp_path / "lora", settings={key: value})
    for place in (folder, with_metadata(folder, tmp_path / "other")):
        began = time.process_time()
        try:
            pipe.load_lora_weights(place)
        except ValueError as error:
            assert f"`{key}`" in str(error) or "`target_modules`" in str(error) or "does not fit" in str(error)
        else:
            assert key != "target_modules"
            pipe.unload_lora_weights()
        assert time.process_time() - began < 5


def test_what_is_left_in_the_settings_of_a_loaded_adapter_is_no_foreign_pattern(lora, tmp_path):
    own = changed_lora(
        lora,
        tmp_path / "lora",
        lambda weights: without(weights, "_moe_gen.d", "_moe_gen.u", "_moe_gen.g"),
        {
            "target_modules": r"(?:.*\.)?language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj(_moe_gen)?|mlp\.\w+_proj)",
            "alpha_pattern": {r"(.*\.)*q_proj": 5, r".*v_proj.*": 7, "k_proj": 9},
        },
    )
    model = load_model()
    model.load_adapter(own)
    config = model.peft_config["default"]
    assert not isinstance(config.target_modules, str)
    assert not any("*" in name for name in config.alpha_pattern)
    scaling = {
        name: model.get_submodule(f"model.language_model.layers.1.self_attn.{name}").scaling["default"]
        for name in ("q_proj", "q_proj_moe_gen", "v_proj_moe_gen", "k_proj", "k_proj_moe_gen")
    }
    assert scaling == {
        "q_proj": 5 / 4,
        "q_proj_moe_gen": 3,
        "v_proj_moe_gen": 7 / 4,
        "k_proj": 9 / 4,
        "k_proj_moe_gen": 3,
    }
    model.save_pretrained(tmp_path / "again")
    again = load_model()
    again.load_adapter(tmp_path / "again")
    assert torch.equal(outputs(again), outputs(model))


# What is right goes on loading


RIGHT: dict[str, dict[str, Any]] = {
    "a list": {"target_modules": ["q_proj", "v_proj_moe_gen"]},
    "all but some": {"target_modules": ["q_proj"], "exclude_modules": r"model\.vision_tower.*"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "a pattern": {"target_modules": r".*language_model.*layers.*(self_attn|mlp).*_proj"},
    "all linear layers": {"target_modules": "all-linear"},
    "ranks by pattern": {"rank_pattern": {r".*layers\.1\..*q_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "biases": {"bias": "lora_only"},
    "a bias": {"lora_bias": True},
    "another start": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("what", RIGHT)
def test_right_adapters_load(what, tmp_path):
    model = adapted_model(LoraConfig(r=4, lora_alpha=12, **RIGHT[what]))
    model.save_pretrained(tmp_path)
    loaded = load_model()
    loaded.load_adapter(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    assert lora_weights(loaded).keys() == lora_weights(model).keys()


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(target_modules=LORA_TARGETS["gen"], r=2),
        IA3Config(target_modules=r".*layers\.\d+\..*(k_proj|down_proj)", feedforward_modules=r".*down_proj"),
    ],
    ids=["LoHa", "IA3"],
)
def test_other_kinds_load_and_lack_no_layer(config, tmp_path):
    model = load_model()
    model.add_adapter(config)
    model.save_pretrained(tmp_path / "whole")
    loaded = load_model()
    loaded.load_adapter(tmp_path / "whole")
    assert torch.equal(outputs(loaded), outputs(model))
    half = changed_lora(tmp_path / "whole", tmp_path / "half", lambda weights: without(weights, "layers.1."))
    before = load_model()
    names = list(before.state_dict())
    with pytest.raises(ValueError, match=r"layers\.1\..* missing"):
        before.load_adapter(half)
    assert list(before.state_dict()) == names


def test_an_adapter_goes_from_the_whole_model_to_its_parts_and_back(lora, tmp_path):
    whole = load_model()
    whole.load_adapter(lora)
    part = load_model()
    part.model.load_adapter(lora)
    assert torch.equal(outputs(part), outputs(whole))
    trained = get_peft_model(
        load_model().model, LoraConfig(r=4, target_modules=r"language_model\.layers\..*[qv]_proj")
    )
    randomise(trained)
    trained.save_pretrained(tmp_path / "part")
    loaded = load_model()
    loaded.load_adapter(tmp_path / "part")
    assert len(lora_weights(loaded)) == len(lora_weights(trained))


def test_a_model_without_a_half_takes_the_other_half_of_an_adapter(lora):
    whole, half = load_model(), load_model(visual_gen=False)
    whole.load_adapter(lora)
    half.load_adapter(lora)
    assert torch.equal(outputs(half), outputs(whole))
    assert not any("_moe_gen" in name for name in lora_weights(half))


def test_missing_layers_are_left_alone_if_that_is_asked_for(lora, tmp_path):
    trained = get_peft_model(load_model(visual_gen=False), LoraConfig(r=4))
    randomise(trained)
    trained.save_pretrained(tmp_path / "half")
    model = load_model()
    with pytest.raises(ValueError, match="allow_missing_layers=True"):
        model.load_adapter(tmp_path / "half")
    model.load_adapter(tmp_path / "half", allow_missing_layers=True)
    assert max_error(outputs(model), outputs(trained)) <= 1e-6
    assert not any("_moe_gen" in name for name in lora_weights(model))
    # A pair that is broken is no missing layer.
    broken = changed_lora(tmp_path / "half", tmp_path / "broken", lambda weights: without(weights, "q_proj.lora_B"))
    with pytest.raises(ValueError, match="lacks .*lora_B"):
        load_model().load_adapter(broken, allow_missing_layers=True)


def test_a_lora_that_changed_its_base_is_no_plain_one(lora, pipe, tmp_path):
    folder = changed_lora(lora, tmp_path / "lora", settings={"init_lora_weights": "pissa_niter_4"})
    with pytest.raises(ValueError, match="pissa_niter_4"):
        pipe.load_lora_weights(folder)


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(float("nan"))], ids=["two numbers", "NaN"])
def test_an_alpha_that_is_none_is_refused(alpha, lora, pipe):
    weights = load_file(lora / "adapter_model.safetensors")
    for name in (f"{FIRST}alpha", "transformer.nowhere.alpha"):
        with pytest.raises(ValueError, match=r"alpha must be a number|NaN"):
            pipe.load_lora_weights(weights | {name: alpha})
