"""LoRA in the pipeline: both file formats, weights, fusing, swapping, saving; refused files leave no trace."""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
import threading

import accelerate
import pytest
import torch
from diffusers.utils import USE_PEFT_BACKEND
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from diffusers_bagel import BagelPipeline
from diffusers_bagel import lora as lora_module
from tests.conftest import CHECKPOINT, load_model, load_processor, max_error
from tests.transformers_bagel.test_adapters import VARIANTS, adapted_model, lora_weights, randomise
from transformers_bagel import LORA_TARGETS, BagelForConditionalGeneration, adapters


PROMPT = "a red circle"
MODULE = "model.language_model.layers.0.self_attn.q_proj_moe_gen"


def make_pipe(model=None, **kwargs) -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(
        CHECKPOINT, transformer=load_model(**kwargs) if model is None else model, processor=load_processor()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: BagelPipeline, **kwargs) -> torch.Tensor:
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **(settings | kwargs)).images


def save_peft(folder, seed: int = 0, **config) -> str:
    """A folder in peft's format, with alpha three times the rank unless told otherwise."""
    model = load_model()
    model.add_adapter(LoraConfig(**({"r": 4, "lora_alpha": 12} | config)))
    randomise(model, seed)
    model.save_pretrained(folder)
    return str(folder)


def save_diffusers(folder, model, metadata: bool = True) -> str:
    BagelPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict() if metadata else None,
    )
    return str(folder)


def drawn_with(folder: str) -> torch.Tensor:
    """What a model draws that loads the adapter by itself."""
    return draw(make_pipe(BagelForConditionalGeneration.from_pretrained(folder)))


def draw_saved(folder) -> torch.Tensor:
    """What a pipeline draws that was saved."""
    loaded = BagelPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return draw(loaded)


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    return draw(make_pipe())


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> str:
    return save_peft(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def other_lora(tmp_path_factory) -> str:
    """It has another rank and alpha, and other layers."""
    return save_peft(tmp_path_factory.mktemp("other"), 1, r=2, lora_alpha=1, target_modules=LORA_TARGETS["gen"])


@pytest.fixture(scope="module")
def with_lora(lora) -> torch.Tensor:
    return drawn_with(lora)


# Formats


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}}],
)
def test_peft_folder_draws_as_when_it_was_saved(tmp_path, config, low_cpu_mem_usage, base):
    model = adapted_model(LoraConfig(r=4, lora_alpha=12, **config))
    expected = draw(make_pipe(model))
    assert max_error(expected, base) > 1e-2
    model.save_pretrained(tmp_path)
    pipe = make_pipe()
    pipe.load_lora_weights(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_file_draws_as_when_it_was_saved(tmp_path, variant):
    model = adapted_model(LoraConfig(r=4, lora_alpha=12, **VARIANTS[variant]))
    save_diffusers(tmp_path, model)
    names = set(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert f"transformer.{MODULE}.lora_A.weight" in names
    pipe = make_pipe()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(draw(pipe), draw(make_pipe(model)))


def test_bfloat16_pipeline_keeps_the_float32_weights_of_a_lora(lora):
    pipe = make_pipe(dtype=torch.bfloat16)
    pipe.load_lora_weights(lora)
    saved = load_file(os.path.join(lora, "adapter_model.safetensors"))
    loaded = dict(pipe.transformer.named_parameters())[f"{MODULE}.lora_A.default_0.weight"]
    assert torch.equal(loaded, saved[f"base_model.model.{MODULE}.lora_A.weight"])
    assert draw(pipe).isfinite().all()


def test_alpha_tensors_of_a_file_without_metadata_count(tmp_path, with_lora, lora):
    weights = {
        name.replace("base_model.model.", "transformer."): tensor
        for name, tensor in load_file(os.path.join(lora, "adapter_model.safetensors")).items()
    }
    alphas = {
        name.replace("lora_A.weight", "alpha"): torch.tensor(12.0)
        for name in weights
        if name.endswith("lora_A.weight")
    }
    save_file(weights | alphas, tmp_path / "pytorch_lora_weights.safetensors")
    pipe = make_pipe()
    pipe.load_lora_weights(tmp_path)
    assert max_error(draw(pipe), with_lora) <= 1e-5


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", ""])
def test_without_any_alpha_it_is_the_rank(lora, prefix, caplog):
    weights = {
        name.replace("base_model.model.", prefix): tensor
        for name, tensor in load_file(os.path.join(lora, "adapter_model.safetensors")).items()
    }
    pipe = make_pipe()
    pipe.load_lora_weights(weights)
    layer = pipe.transformer.get_submodule(MODULE)
    assert layer.scaling == {"default_0": 1.0}
    assert ("lora_alpha" in caplog.text) == prefix.startswith("base_model")


def test_names_of_the_published_code_are_known(lora, with_lora, tmp_path):
    weights = {
        name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model."): tensor
        for name, tensor in load_file(os.path.join(lora, "adapter_model.safetensors")).items()
    }
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(open(os.path.join(lora, "adapter_config.json"), "rb").read())
    pipe = make_pipe()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(draw(pipe), with_lora)


def test_pattern_of_original_names_is_known(lora, with_lora, tmp_path):
    config = json.loads(open(os.path.join(lora, "adapter_config.json")).read())
    config["target_modules"] = r"language_model\.model\.layers\.\d+\.(self_attn|mlp).*_proj.*"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = {
        name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model."): tensor
        for name, tensor in load_file(os.path.join(lora, "adapter_model.safetensors")).items()
    }
    save_file(weights, tmp_path / "adapter_model.safetensors")
    pipe = make_pipe()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(draw(pipe), with_lora)


@pytest.mark.parametrize("how", ["file", "weight_name", "subfolder"])
def test_file_is_found_with_its_settings(lora, how, with_lora):
    folder, name = os.path.split(lora)
    source, arguments = {
        "file": (os.path.join(lora, "adapter_model.safetensors"), {}),
        "weight_name": (lora, {"weight_name": "adapter_model.safetensors"}),
        "subfolder": (folder, {"subfolder": name, "weight_name": "adapter_model.safetensors"}),
    }[how]
    pipe = make_pipe()
    pipe.load_lora_weights(source, **arguments)
    assert torch.equal(draw(pipe), with_lora)


def test_pickled_file_is_read_too(tmp_path, lora):
    model = load_model()
    model.load_adapter(lora)
    weights = get_peft_model_state_dict(model)
    BagelPipeline.save_lora_weights(tmp_path, weights, safe_serialization=False)
    assert os.listdir(tmp_path) == ["pytorch_lora_weights.bin"]
    state_dict = BagelPipeline.lora_state_dict(tmp_path)
    assert set(state_dict) == {f"transformer.{name}" for name in weights}


def test_saving_without_metadata_warns_of_alpha(tmp_path, lora, caplog):
    model = load_model()
    model.load_adapter(lora)
    save_diffusers(tmp_path, model, metadata=False)
    assert "alpha" in caplog.text


def test_saving_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`transformer_lora_layers`"):
        BagelPipeline.save_lora_weights(tmp_path)


# Adapters side by side


def test_weights_of_adapters(lora, other_lora, base, with_lora):
    pipe = make_pipe()
    pipe.load_lora_weights(lora, adapter_name="one")
    pipe.load_lora_weights(other_lora, adapter_name="two")
    assert pipe.get_list_adapters() == {"transformer": ["one", "two"]}
    assert pipe.get_active_adapters() == ["two"]
    pipe.set_adapters("one")
    assert torch.equal(draw(pipe), with_lora)
    pipe.set_adapters("two")
    assert torch.equal(draw(pipe), drawn_with(other_lora))
    pipe.set_adapters(["one", "two"], [1.0, 0.0])
    assert max_error(draw(pipe), with_lora) <= 1e-6
    pipe.set_adapters(["one", "two"], 0.0)
    assert max_error(draw(pipe), base) <= 1e-6
    pipe.set_adapters(["one", "two"], [0.5, {"transformer": 2.0}])
    both = draw(pipe)
    assert min(max_error(both, image) for image in (base, with_lora)) > 1e-3
    layer = pipe.transformer.get_submodule(MODULE)
    assert layer.scaling == {"one": 0.5 * 12 / 4, "two": 2.0 * 1 / 2}
    pipe.delete_adapters("two")
    pipe.set_adapters("one")
    assert torch.equal(draw(pipe), with_lora)


def test_disabled_lora_is_the_base_until_it_is_enabled(lora, base, with_lora):
    pipe = make_pipe()
    pipe.load_lora_weights(lora)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), base)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), with_lora)


@pytest.mark.parametrize("how", ["unload", "delete"])
def test_removed_lora_leaves_the_exact_base(lora, base, how, tmp_path):
    pipe = make_pipe()
    names = list(pipe.transformer.state_dict())
    pipe.load_lora_weights(lora, adapter_name="one")
    if how == "unload":
        pipe.unload_lora_weights()
    else:
        pipe.delete_adapters("one")
    assert torch.equal(draw(pipe), base)
    assert list(pipe.transformer.state_dict()) == names
    pipe.load_lora_weights(lora, adapter_name="one")


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fused_lora_draws_the_same_and_unfused_too(lora, scale, base):
    pipe = make_pipe()
    pipe.load_lora_weights(lora, adapter_name="one")
    expected = draw(pipe)
    scaled = draw(pipe, attention_kwargs={"scale": scale})
    pipe.fuse_lora(lora_scale=scale)
    assert pipe.num_fused_loras == 1 and pipe.fused_loras == {"one"}
    assert max_error(draw(pipe), scaled) <= 1e-5
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert max_error(draw(pipe), expected) <= 1e-5
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    assert not lora_weights(pipe.transformer)
    assert max_error(draw(pipe), scaled) <= 1e-5


def test_second_adapter_is_loaded_without_a_word_of_missing_weights(lora, other_lora, capfd):
    pipe = make_pipe()
    pipe.load_lora_weights(lora, adapter_name="one")
    pipe.load_lora_weights(other_lora, adapter_name="model")
    assert "MISSING" not in "".join(capfd.readouterr())


def test_loading_silences_its_own_thread_alone(lora, other_lora, monkeypatch):
    pipe = make_pipe()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    reports = logging.getLogger("transformers.integrations.peft")
    load = pipe.transformer.load_adapter

    def watched_load(**kwargs):
        reports.error("of this thread")
        other = threading.Thread(target=reports.error, args=("of another thread",))
        other.start()
        other.join()
        return load(**kwargs)

    monkeypatch.setattr(pipe.transformer, "load_adapter", watched_load)
    reports.addHandler(handler)
    try:
        pipe.load_lora_weights(lora)
        reports.error("afterwards")
    finally:
        reports.removeHandler(handler)
    assert said == ["of another thread", "afterwards"]


def test_a_pipeline_is_saved_to_a_folder_or_nowhere(tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    for place in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(OSError, match="`save_directory`.*is a file"):
            make_pipe().save_pretrained(place)
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


def test_loading_leaves_other_adapters_trainable(lora, other_lora):
    pipe = make_pipe()
    pipe.transformer.add_adapter(LoraConfig(), "trained")
    pipe.transformer.train()
    pipe.load_lora_weights(other_lora, adapter_name="two")
    pipe.set_adapters(["trained", "two"])
    trained = {name for name, weight in pipe.transformer.named_parameters() if weight.requires_grad}
    assert any(".trained." in name for name in trained)
    assert pipe.transformer.training


# Hotswap


def test_hotswap_puts_a_lora_in_the_place_of_another(tmp_path, lora, with_lora):
    pipe = make_pipe()
    pipe.load_lora_weights(save_peft(tmp_path / "first", 2, r=4, lora_alpha=2), adapter_name="one")
    assert max_error(draw(pipe), with_lora) > 1e-3
    weight = pipe.transformer.get_submodule(MODULE).lora_A["one"].weight
    pipe.load_lora_weights(lora, adapter_name="one", hotswap=True)
    assert torch.equal(draw(pipe), with_lora)
    assert pipe.transformer.get_submodule(MODULE).lora_A["one"].weight is weight


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_hotswap_of_variants(tmp_path, variant):
    pipe = make_pipe()
    first = save_peft(tmp_path / "first", 2, **VARIANTS[variant])
    second = save_peft(tmp_path / "second", 3, **VARIANTS[variant], lora_alpha=6)
    pipe.load_lora_weights(first, adapter_name="one")
    pipe.load_lora_weights(second, adapter_name="one", hotswap=True)
    assert torch.equal(draw(pipe), drawn_with(second))


def test_hotswap_between_ranks_after_enabling_it(tmp_path, lora, other_lora, with_lora):
    pipe = make_pipe()
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(lora, adapter_name="one")
    assert max_error(draw(pipe), with_lora) <= 1e-5
    pipe.load_lora_weights(other_lora, adapter_name="one", hotswap=True)
    expected = drawn_with(other_lora)
    assert max_error(draw(pipe), expected) <= 1e-5
    assert pipe.transformer.get_submodule(MODULE).lora_A["one"].weight.shape[0] == 8
    pipe.transformer.save_pretrained(tmp_path)
    assert max_error(drawn_with(str(tmp_path)), expected) <= 1e-5


def test_compiled_transformer_is_hotswapped_and_saved(lora, other_lora, tmp_path):
    pipe = make_pipe()
    pipe.load_lora_weights(other_lora, adapter_name="one")
    pipe.transformer = compiled = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(RuntimeError, match="unexpected keys"):
        pipe.load_lora_weights(lora, adapter_name="one", hotswap=True)
    pipe.load_lora_weights(other_lora, adapter_name="one", hotswap=True)
    pipe.transformer = compiled._orig_mod
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.transformer = compiled
    pipe.save_pretrained(tmp_path)
    assert max_error(draw_saved(tmp_path), drawn_with(other_lora)) <= 1e-5


def test_hotswap_is_enabled_before_the_first_load(lora):
    pipe = make_pipe()
    pipe.load_lora_weights(lora)
    with pytest.raises(RuntimeError, match="before"):
        pipe.enable_lora_hotswap(target_rank=8)


def test_hotswap_needs_an_adapter_of_that_name(lora):
    pipe = make_pipe()
    pipe.load_lora_weights(lora, adapter_name="one")
    with pytest.raises(ValueError, match="`adapter_name`.*'one'.*'two'"):
        pipe.load_lora_weights(lora, adapter_name="two", hotswap=True)


# Scale


def test_scale_weighs_active_adapters_during_the_call_only(lora, base, with_lora):
    pipe = make_pipe()
    pipe.load_lora_weights(lora, adapter_name="one")
    assert torch.equal(draw(pipe, attention_kwargs={"scale": 1.0}), with_lora)
    assert max_error(draw(pipe, attention_kwargs={"scale": 0.0}), base) <= 1e-6
    half = draw(pipe, attention_kwargs={"scale": 0.5})
    assert torch.equal(draw(pipe), with_lora)
    pipe.set_adapters("one", 0.5)
    assert torch.equal(draw(pipe), half)
    draw(pipe, attention_kwargs={"scale": 0.0})
    assert torch.equal(draw(pipe), half)


def test_scale_holds_in_every_forward_of_a_call(lora, monkeypatch):
    pipe = make_pipe()
    pipe.load_lora_weights(lora)
    layer = pipe.transformer.get_submodule(MODULE)
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((layer.scaling["default_0"], "scale" in kwargs)), with_kwargs=True
    )
    draw(pipe, attention_kwargs={"scale": 0.5}, think=True, max_think_tokens=3)
    assert len(seen) > 5
    assert set(seen) == {(1.5, False)}


def test_scale_is_restored_after_an_exception(lora, with_lora):
    pipe = make_pipe()
    pipe.load_lora_weights(lora)

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, attention_kwargs={"scale": 0.5}, callback_on_step_end=stop)
    assert torch.equal(draw(pipe), with_lora)


def test_scale_without_lora_warns(pipe, caplog, base):
    assert torch.equal(draw(pipe, attention_kwargs={"scale": 0.5}), base)
    assert "scale" in caplog.text


def test_scale_must_be_a_number(pipe):
    with pytest.raises(TypeError, match="scale"):
        draw(pipe, attention_kwargs={"scale": "0.5"})


# Refused, without a trace


def bad_sources(folder: str) -> dict[str, object]:
    weights = load_file(os.path.join(folder, "adapter_model.safetensors"))
    name = f"base_model.model.{MODULE}.lora_A.weight"
    return {
        "unknown names": {"transformer.blocks.0.lora_A.weight": torch.zeros(4, 4)},
        "no lora": {"transformer.model.language_model.norm.weight": torch.zeros(64)},
        "empty": {},
        "wrong shape": weights | {name: torch.zeros(4, 3)},
        "lora_B missing": {key: tensor for key, tensor in weights.items() if key != name.replace("lora_A", "lora_B")},
        "no linear layer": {
            "model.language_model.embed_tokens.lora_A.weight": torch.zeros(4, 64),
            "model.language_model.embed_tokens.lora_B.weight": torch.zeros(64, 4),
        },
        "half unknown": weights | {"base_model.model.nowhere.lora_A.weight": torch.zeros(4, 3)},
    }


@pytest.mark.parametrize("loaded_before", [False, True])
@pytest.mark.parametrize(
    "what", ["unknown names", "no lora", "empty", "wrong shape", "lora_B missing", "no linear layer", "half unknown"]
)
def test_weights_that_do_not_fit_are_refused_without_a_trace(lora, what, loaded_before):
    pipe = make_pipe()
    if loaded_before:
        pipe.load_lora_weights(lora, adapter_name="one")
    before, adapters = state_of(pipe.transformer), pipe.get_list_adapters()
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path_or_dict`"):
        pipe.load_lora_weights(bad_sources(lora)[what], adapter_name="bad")
    assert state_of(pipe.transformer) == before
    assert pipe.get_list_adapters() == adapters
    pipe.load_lora_weights(lora, adapter_name="bad")


def state_of(model) -> list[tuple]:
    return [(name, id(weight), weight.requires_grad) for name, weight in model.named_parameters()]


@pytest.mark.parametrize("where", [(LoraLayer, "update_layer"), (adapters, "settle_adapter")], ids=["inject", "end"])
@pytest.mark.parametrize("loaded_before", [False, True])
def test_failure_in_the_middle_of_a_load_is_undone(lora, other_lora, loaded_before, where, monkeypatch, with_lora):
    pipe = make_pipe()
    if loaded_before:
        pipe.load_lora_weights(other_lora, adapter_name="one")
    before, names, expected = state_of(pipe.transformer), list(pipe.transformer.state_dict()), draw(pipe)
    calls = itertools.count()
    original = getattr(*where)

    def fail(*args, **kwargs):
        if where[0] is adapters or next(calls) == 20:
            raise MemoryError
        original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        with pytest.raises(MemoryError):
            pipe.load_lora_weights(lora, adapter_name="two")
    assert state_of(pipe.transformer) == before
    assert list(pipe.transformer.state_dict()) == names
    assert torch.equal(draw(pipe), expected)
    assert pipe.get_active_adapters() == (["one"] if loaded_before else [])
    pipe.load_lora_weights(lora, adapter_name="two")
    assert torch.equal(draw(pipe), with_lora)


def test_lora_that_lacks_layers_of_its_settings_is_refused(lora, tmp_path):
    weights = load_file(os.path.join(lora, "adapter_model.safetensors"))
    part = {name: tensor for name, tensor in weights.items() if ".layers.0." in name}
    assert 0 < len(part) < len(weights)
    save_file(part, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(open(os.path.join(lora, "adapter_config.json"), "rb").read())
    pipe = make_pipe()
    before = state_of(pipe.transformer)
    with pytest.raises(ValueError, match=r"layers\.1\..* missing"):
        pipe.load_lora_weights(tmp_path)
    assert state_of(pipe.transformer) == before


def test_settings_that_do_not_fit_the_weights_are_refused(lora, tmp_path):
    save_peft(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    pipe = make_pipe()
    with pytest.raises(ValueError, match=r"lora_A\.weight is \(4, .*expected \(8, "):
        pipe.load_lora_weights(tmp_path)
    assert not lora_weights(pipe.transformer)


def test_name_may_begin_as_another_does_or_as_the_layers_of_a_lora_do(lora, other_lora, with_lora):
    pipe = make_pipe()
    pipe.load_lora_weights(other_lora, adapter_name="style_2")
    pipe.load_lora_weights(other_lora, adapter_name="lora")
    pipe.load_lora_weights(lora, adapter_name="style")
    pipe.set_adapters("style")
    assert torch.equal(draw(pipe), with_lora)


def test_taken_name_is_refused(lora):
    pipe = make_pipe()
    pipe.load_lora_weights(lora, adapter_name="one")
    with pytest.raises(ValueError, match="`adapter_name`.*'one'"):
        pipe.load_lora_weights(lora, adapter_name="one")
    pipe.load_lora_weights(lora)
    pipe.load_lora_weights(lora)
    assert pipe.get_list_adapters() == {"transformer": ["one", "default_1", "default_2"]}


@pytest.mark.parametrize("weight_name", [None, "missing.safetensors"])
def test_missing_file_is_named(tmp_path, weight_name, pipe):
    with pytest.raises(OSError, match=r"`pretrained_model_name_or_path_or_dict`.*adapter_model\.safetensors"):
        pipe.load_lora_weights(tmp_path, weight_name=weight_name)


def test_source_of_another_type_is_refused(pipe):
    with pytest.raises(TypeError, match="`pretrained_model_name_or_path_or_dict`.*int"):
        pipe.load_lora_weights(5)


def test_missing_peft_is_named(lora, monkeypatch, pipe):
    assert USE_PEFT_BACKEND
    monkeypatch.setattr(lora_module, "is_peft_available", lambda: False)
    with pytest.raises(ValueError, match="pip install peft"):
        pipe.load_lora_weights(lora)


# Offloading


@pytest.mark.parametrize("offloaded", ["model", "lm_head"])
def test_transformer_offloaded_by_its_device_map_refuses_a_lora(lora, offloaded, tmp_path):
    places = {"model": "cpu", "lm_head": "cpu"} | {offloaded: "disk"}
    pipe = make_pipe(device_map=places, offload_folder=str(tmp_path))
    before = state_of(pipe.transformer)
    with pytest.raises(ValueError, match="`device_map`.*`pipe.enable_model_cpu_offload"):
        pipe.load_lora_weights(lora)
    assert state_of(pipe.transformer) == before


@pytest.mark.parametrize(
    "enable",
    [
        lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload("cpu", offload_type="leaf_level"),
        lambda pipe: pipe.enable_group_offload("cpu", num_blocks_per_group=2),
    ],
    ids=["layer", "leaf", "block"],
)
def test_every_kind_of_offloading_takes_a_lora_and_goes_on(lora, with_lora, enable, monkeypatch):
    # accelerate 1.15 cannot offload any model to "cpu:0", the name that diffusers gives this stand-in for a GPU.
    offload = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **kw: offload(model, "cpu", **kw))
    pipe = make_pipe()
    enable(pipe)
    before = hooked_modules(pipe.transformer)
    pipe.load_lora_weights(lora, adapter_name="one")
    assert torch.equal(draw(pipe), with_lora)
    after = hooked_modules(pipe.transformer)
    assert {name.replace(".base_layer", "") for name in after} >= before
    added = {name for name in after if ".lora_A.one" in name}
    assert bool(added) == any("q_proj" in name for name in before)


def hooked_modules(model) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if hasattr(module, "_hf_hook") or getattr(module, "_diffusers_hook", None)
    }


def test_offloaded_pipeline_takes_a_lora_and_stays_offloaded(lora, with_lora):
    pipe = make_pipe()
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.load_lora_weights(lora, adapter_name="one")
    assert hasattr(pipe.transformer, "_hf_hook") and hasattr(pipe.vae, "_hf_hook")
    assert torch.equal(draw(pipe), with_lora)
    with pytest.raises(ValueError, match="`adapter_name`"):
        pipe.load_lora_weights(lora, adapter_name="one")
    assert hasattr(pipe.transformer, "_hf_hook")
    pipe.remove_all_hooks()


# Saving


def change(pipe: BagelPipeline, how: str, lora: str, other_lora: str) -> None:
    pipe.load_lora_weights(lora, adapter_name="one")
    if how in ("two", "inactive"):
        pipe.load_lora_weights(other_lora, adapter_name="two")
    if how == "two":
        pipe.set_adapters(["one", "two"], [0.7, 0.3])
    if how == "disabled":
        pipe.disable_lora()
    if how == "fused":
        pipe.fuse_lora(lora_scale=0.5)


@pytest.mark.parametrize("how", ["one", "two", "inactive", "disabled", "fused"])
def test_pipeline_with_adapters_is_not_saved_and_nothing_is_written(tmp_path, how, lora, other_lora):
    pipe = make_pipe()
    change(pipe, how, lora, other_lora)
    expected, before = draw(pipe), state_of(pipe.transformer)
    with pytest.raises(ValueError, match=r"\(one.*`fuse_lora\(\)` and `unload_lora_weights\(\)`.*`save_lora_weights`"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert state_of(pipe.transformer) == before
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("how", ["one", "two", "inactive", "disabled", "fused"])
def test_pipeline_saved_without_its_adapters_draws_the_same(tmp_path, how, lora, other_lora):
    pipe = make_pipe()
    change(pipe, how, lora, other_lora)
    expected = draw(pipe)
    if how in ("one", "two", "inactive"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    assert max_error(draw_saved(tmp_path), expected) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_model_is_merged_before_the_pipeline_is_saved(tmp_path, variant):
    model = get_peft_model(load_model(), LoraConfig(**VARIANTS[variant]))
    randomise(model)
    pipe = make_pipe(model)
    expected = draw(pipe)
    with pytest.raises(ValueError, match=r"`merge_and_unload\(\)`"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pipe.transformer = model.merge_and_unload()
    pipe.save_pretrained(tmp_path / "out")
    assert max_error(draw_saved(tmp_path / "out"), expected) <= 1e-5


def test_adapters_of_a_peft_model_are_not_managed_by_the_pipeline(lora):
    model = get_peft_model(load_model(), LoraConfig())
    pipe = make_pipe(model)
    for method in (lambda: pipe.load_lora_weights(lora), pipe.fuse_lora, pipe.unfuse_lora, pipe.unload_lora_weights):
        with pytest.raises(TypeError, match="PeftModel"):
            method()
    pipe.transformer = model.get_base_model()
    pipe.load_lora_weights(lora, adapter_name="one")


def test_loaded_lora_is_saved_by_the_model_as_an_adapter(tmp_path, lora, with_lora):
    pipe = make_pipe()
    pipe.load_lora_weights(lora)
    pipe.transformer.save_pretrained(tmp_path)
    assert torch.equal(drawn_with(str(tmp_path)), with_lora)


def test_new_process_draws_the_same_image(tmp_path, lora):
    pipe = make_pipe()
    pipe.load_lora_weights(lora, adapter_name="one")
    save_diffusers_of = {
        "transformer_lora_layers": get_peft_model_state_dict(pipe.transformer, adapter_name="one"),
        "transformer_lora_adapter_metadata": pipe.transformer.peft_config["one"].to_dict(),
    }
    pipe.save_lora_weights(tmp_path / "lora", **save_diffusers_of)
    torch.save(draw(pipe), tmp_path / "expected.pt")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipe")
    code = f"""
import torch
from tests.diffusers_bagel.test_lora import draw, make_pipe, max_error
from diffusers_bagel import BagelPipeline
expected = torch.load(r"{tmp_path / "expected.pt"}")
pipe = make_pipe()
pipe.load_lora_weights(r"{tmp_path / "lora"}")
assert torch.equal(draw(pipe), expected)
assert max_error(draw(BagelPipeline.from_pretrained(r"{tmp_path / "pipe"}")), expected) <= 1e-5
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_saving_goes_to_a_folder_or_nowhere(tmp_path, lora, monkeypatch):
    model = load_model()
    model.load_adapter(lora)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for place in ("file", "file/new", "nowhere"):
        for save in (lambda folder: save_diffusers(folder, model), model.save_pretrained):
            with pytest.raises(OSError, match=r"`save_directory`.*(file|link)"):
                save(tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, save in (("diffusers", lambda folder: save_diffusers(folder, model)), ("peft", model.save_pretrained)):
        save(f"~/{name}")
        # Onto what is there, as the libraries do.
        save(f"~/{name}")
        pipe = make_pipe()
        pipe.load_lora_weights(tmp_path / name)
