"""The pipeline in less memory: quantised, offloaded, cast by layer, and with a part of the transformer."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig
from diffusers.hooks import group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, golden_image, load_model, load_processor, max_error
from tests.peak_memory import OVERHEAD, empty_model, peaks_of, write_checkpoint
from tests.quantization import (
    QUANTIZATIONS,
    bitsandbytes_int8,
    bitsandbytes_nf4,
    quantized_layers,
    torchao_int8,
)
from transformers_bagel import LORA_TARGETS


SMALL = {"height": 48, "width": 64, "num_inference_steps": 3, "output_type": "pt"}
# Of the tiny model's random weights, for pixels in [0, 1]: on average.
BOUNDS = {torchao_int8: 0.02, bitsandbytes_int8: 0.02, bitsandbytes_nf4: 0.1}


def load(folder=CHECKPOINT, **kwargs) -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(folder, processor=load_processor(), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: BagelPipeline, **kwargs) -> torch.Tensor:
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **(SMALL | kwargs)).images


def edited(pipe: BagelPipeline) -> torch.Tensor:
    """Of all that a pipeline does with its transformer: seeing, thinking, drawing."""
    return drawn(pipe, image=golden_image("square"), think=True, max_think_tokens=4, height=None, width=None)


def mean_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual - expected).abs().mean().item()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """diffusers' layout."""
    folder = tmp_path_factory.mktemp("saved")
    load().save_pretrained(folder)
    return str(folder)


class TestQuantization:
    @pytest.mark.parametrize("quantize", QUANTIZATIONS, ids=lambda quantize: quantize.__name__)
    @pytest.mark.parametrize("layout", ["original", "saved"])
    @pytest.mark.parametrize("wrapped", [False, True], ids=["of the transformer", "of the pipeline"])
    def test_the_transformer_is_quantized_and_draws(self, quantize, layout, wrapped, saved, pipe):
        config = quantize()
        if wrapped:
            config = PipelineQuantizationConfig(quant_mapping={"transformer": config})
        folder = CHECKPOINT if layout == "original" else saved
        quantized = load(folder, quantization_config=config, dtype=torch.bfloat16)
        expected = quantized_layers(load_model(quantization_config=quantize()))
        assert quantized_layers(quantized.transformer) == expected
        assert not quantized_layers(quantized.vae)
        assert "transformer" in quantized.quantization_config.config_mapping
        assert 0 < mean_error(drawn(quantized), drawn(pipe)) <= BOUNDS[quantize]

    @pytest.mark.parametrize("layout", ["original", "saved"])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_backend_may_be_named(self, bits, layout, saved):
        config = PipelineQuantizationConfig(
            quant_backend=f"bitsandbytes_{bits}bit",
            quant_kwargs={f"load_in_{bits}bit": True},
            components_to_quantize=["transformer"],
        )
        folder = CHECKPOINT if layout == "original" else saved
        assert quantized_layers(load(folder, quantization_config=config).transformer)

    def test_a_quantized_pipeline_saves_and_loads(self, tmp_path):
        quantized = load(quantization_config=torchao_int8(), dtype=torch.bfloat16)
        quantized.save_pretrained(tmp_path)
        loaded = load(tmp_path, dtype=torch.bfloat16)
        assert quantized_layers(loaded.transformer) == quantized_layers(quantized.transformer)
        assert torch.equal(drawn(loaded), drawn(quantized))

    def test_configurations_that_cannot_work_are_refused(self, saved):
        for folder in (CHECKPOINT, saved):
            with pytest.raises(ValueError, match="could not be found"):
                load(folder, quantization_config="int8")
            with pytest.raises(ValueError, match="from `transformers`"):
                load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
        everything = PipelineQuantizationConfig(quant_backend="bitsandbytes_8bit", quant_kwargs={"load_in_8bit": True})
        with pytest.raises(ValueError, match="components_to_quantize"):
            load(quantization_config=everything)

    def test_components_that_are_not_there_are_named(self, caplog):
        config = PipelineQuantizationConfig(quant_mapping={"transformer": torchao_int8(), "unet": torchao_int8()})
        assert quantized_layers(load(quantization_config=config).transformer)
        assert "unet" in caplog.text
        other = PipelineQuantizationConfig(quant_mapping={"unet": torchao_int8()})
        assert not quantized_layers(load(quantization_config=other).transformer)

    @pytest.mark.parametrize("quantize", QUANTIZATIONS, ids=lambda quantize: quantize.__name__)
    def test_lora_weights_load_into_a_quantized_transformer(self, quantize, tmp_path):
        trained = load_model(dtype=torch.bfloat16)
        # One of the two experts, whose outputs must go together then, too.
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=LORA_TARGETS["gen"])
        trained.add_adapter(config)
        BagelPipeline.save_lora_weights(
            tmp_path,
            transformer_lora_layers=get_peft_model_state_dict(trained),
            transformer_lora_adapter_metadata=trained.peft_config["default"].to_dict(),
        )
        quantized = load(quantization_config=quantize(), dtype=torch.bfloat16)
        before = drawn(quantized)
        quantized.load_lora_weights(tmp_path)
        adapted = drawn(quantized)
        assert max_error(adapted, before) > 0.1
        high = load(transformer=trained)
        assert mean_error(adapted, drawn(high)) <= BOUNDS[quantize] < mean_error(before, drawn(high))
        quantized.unload_lora_weights()
        assert torch.equal(drawn(quantized), before)


class TestOffloading:
    @pytest.mark.parametrize("blocks", [None, 1, 2])
    def test_group_offloading_draws_the_same(self, blocks):
        plain = edited(load())
        pipe = load()
        how = {"offload_type": "leaf_level"} if blocks is None else {"num_blocks_per_group": blocks}
        pipe.enable_group_offload(torch.device("cpu"), **how)
        assert torch.equal(edited(pipe), plain)

    @pytest.mark.parametrize("blocks", [None, 1])
    def test_every_layer_is_there_when_it_computes(self, blocks, monkeypatch, encode):
        """On a GPU a layer whose group was not brought there would fail: here it is asked for at each forward."""
        present: set[int] = set()

        def tensors_of(group: ModuleGroup) -> set[int]:
            modules = [tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())]
            return {id(tensor) for tensor in (*modules, *group.parameters, *group.buffers)}

        def tracked(name: str, change: Callable) -> None:
            original = getattr(ModuleGroup, name)

            def move(group: ModuleGroup) -> None:
                change(tensors_of(group))
                original(group)

            monkeypatch.setattr(ModuleGroup, name, move)

        tracked("onload_", present.update)
        tracked("offload_", present.difference_update)
        pipe = load()
        model = pipe.transformer

        def checked(name: str, module: torch.nn.Module, forward: Callable) -> Callable:
            def check(*args, **kwargs):
                own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
                assert {id(tensor) for tensor in own} <= present, name
                return forward(*args, **kwargs)

            return check

        for name, module in model.named_modules():
            if list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
                module.forward = checked(name, module, module.forward)
        how = {"offload_type": "leaf_level"} if blocks is None else {"num_blocks_per_group": blocks}
        pipe.enable_group_offload("cpu", **how)
        present.clear()
        edited(pipe)
        pipe.enable_taylorseer(interval=2, warmup_steps=1, max_order=1)
        drawn(pipe)
        model.generate(**encode(["@wide", "what?"]), max_new_tokens=2)
        for layer in (model.model.language_model.layers[0], model.model.vision_tower.encoder.layers[0]):
            assert not {id(tensor) for tensor in layer.parameters()} & present
            assert blocks is None or hasattr(layer, "_diffusers_hook")

    @pytest.mark.parametrize("how", ["leaf_level", "block_level"])
    def test_with_a_stream_each_layer_knows_which_one_to_bring_next(self, how, monkeypatch, encode):
        """The stream of a device that is not there: nothing is moved, but the order is learned and taken."""

        class Backend(SimpleNamespace):
            def __init__(self, device):
                stream = SimpleNamespace(synchronize=lambda: None)
                super().__init__(Stream=lambda: stream, current_stream=lambda: stream)

        monkeypatch.setattr(group_offloading, "TorchDeviceBackend", Backend)
        for name in ("onload_", "offload_"):
            monkeypatch.setattr(ModuleGroup, name, lambda group: None)
        monkeypatch.setattr(group_offloading, "send_to_device", lambda values, *args, **kwargs: values)
        model, inputs = load_model(), encode(["@wide", "what?"])
        expected = model(**inputs).logits
        settings = {"num_blocks_per_group": 1, "use_stream": True, "low_cpu_mem_usage": True}
        group_offloading.apply_group_offloading(model, "meta", offload_type=how, **settings)
        assert torch.equal(model(**inputs).logits, expected)
        hooks = [
            next(module for module in layer.modules() if hasattr(module, "_diffusers_hook"))._diffusers_hook.get_hook(
                "group_offloading"
            )
            for layer in model.model.language_model.layers
        ]
        if how == "block_level":
            assert hooks[0].next_group is hooks[1].group
        assert hooks[0].next_group is not None and not hooks[1].group.onload_self

    @pytest.mark.parametrize("quantize", QUANTIZATIONS, ids=lambda quantize: quantize.__name__)
    @pytest.mark.parametrize("how", ["model", "leaf_level", "block_level"])
    def test_offloading_a_quantized_pipeline_draws_the_same(self, quantize, how):
        pipe = load(quantization_config=quantize(), dtype=torch.bfloat16)
        plain = drawn(pipe)
        if how == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        else:
            pipe.enable_group_offload("cpu", offload_type=how, num_blocks_per_group=1)
        for _ in range(2):
            assert torch.equal(drawn(pipe), plain)


class TestLayerwiseCasting:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_layers_rest_in_float8_and_draw_nearly_the_same(self, dtype):
        plain = load(dtype=dtype)
        pipe = load(dtype=dtype)
        pipe.enable_layerwise_casting()
        for _ in range(2):
            assert 0 < mean_error(edited(pipe), edited(plain)) <= 0.05
        cast = {name for name, tensor in pipe.transformer.named_parameters() if tensor.dtype == torch.float8_e4m3fn}
        layers = {
            f"{name}.{parameter}"
            for name, module in pipe.transformer.named_modules()
            for parameter, _ in module.named_parameters(recurse=False)
            if isinstance(module, torch.nn.Linear) and ".layers." in name
        }
        assert cast == layers
        assert {tensor.dtype for name, tensor in pipe.transformer.state_dict().items() if name not in cast} == {dtype}

    def test_it_goes_with_adapters_and_offloading(self):
        pipe = load(dtype=torch.bfloat16)
        pipe.transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False))
        plain = drawn(pipe)
        pipe.enable_layerwise_casting()
        cast = drawn(pipe)
        assert mean_error(cast, plain) <= 0.05
        assert all(
            tensor.dtype == torch.float32 for name, tensor in pipe.transformer.named_parameters() if ".lora_" in name
        )
        pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(drawn(pipe), cast)
        pipe.remove_all_hooks()
        pipe.enable_group_offload("cpu", offload_type="leaf_level")
        assert torch.equal(drawn(pipe), cast)

    def test_quantized_layers_are_not_cast(self):
        with pytest.raises(ValueError, match="quantised"):
            load(quantization_config=torchao_int8()).enable_layerwise_casting()

    def test_lora_weights_load_after_it(self, tmp_path):
        first = load(dtype=torch.bfloat16)
        first.transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False))
        weights = {
            f"transformer.{name}": tensor for name, tensor in get_peft_model_state_dict(first.transformer).items()
        }
        first.enable_layerwise_casting()
        then = load(dtype=torch.bfloat16)
        then.enable_layerwise_casting()
        then.load_lora_weights(weights)
        # Alpha is 8 in the first, and the rank in the second.
        then.set_adapters("default_0", 2.0)
        assert torch.equal(drawn(first), drawn(then))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_loading_a_pipeline_takes_the_weights_and_no_second_copy(tmp_path, pipe):
    original, saved = tmp_path / "original", tmp_path / "saved"
    for folder in (original, saved / "transformer"):
        folder.mkdir(parents=True)
        write_checkpoint(folder, "F32", torch.float32)
    for name in ("ae.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, original)
    for name in ("vae", "scheduler", "processor"):
        getattr(pipe, name).save_pretrained(saved / name)
    pipe.save_config(saved)
    # In a process each: up to 15 MB of what one load leaves would be counted as had before the next, which takes them again.
    peaks = [peaks_of({"of": ("BagelPipeline", str(folder), "")})["of"] for folder in (original, saved)]
    weights = sum(2 * tensor.numel() for tensor in empty_model().state_dict().values())
    vae = sum(6 * tensor.numel() for tensor in pipe.vae.state_dict().values())
    for peak in peaks:
        assert weights < peak < weights + vae + OVERHEAD


class TestPartsOfATransformer:
    def test_a_transformer_that_cannot_draw_is_refused(self):
        with pytest.raises(ValueError, match="`transformer` cannot draw.*visual_gen"):
            load(transformer=load_model(visual_gen=False))

    def test_a_saved_part_that_cannot_draw_is_refused(self, saved, tmp_path):
        shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "transformer")
        load_model(visual_gen=False).save_pretrained(tmp_path / "transformer")
        with pytest.raises(ValueError, match="`transformer` cannot draw.*visual_gen"):
            load(tmp_path)

    def test_a_transformer_that_cannot_see_draws_and_refuses_images(self, pipe):
        blind = load(transformer=load_model(visual_und=False))
        assert torch.equal(drawn(blind), drawn(pipe))
        with pytest.raises(ValueError, match="`image`: the transformer cannot see.*visual_und"):
            edited(blind)
