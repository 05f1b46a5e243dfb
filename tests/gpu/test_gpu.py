"""Host and device in turns, kernels of a GPU, and memory of two kinds: what a CPU can only stand in for."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

from diffusers_bagel import BagelPipeline
from diffusers_bagel.contexts import BagelContext, ContextReader
from tests.conftest import CHECKPOINT, conversation, golden_image, load_processor, max_error, training_samples
from tests.diffusers_bagel.conftest import encoded
from tests.quantization import QUANTIZATIONS, quantized_layers
from transformers_bagel import (
    LORA_TARGETS,
    BagelDataCollator,
    BagelDataLoader,
    BagelForConditionalGeneration,
)
from transformers_bagel.training.trainer import BagelTrainer


ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes" / "checkpoint"
GPU = torch.device("cuda")
SMALL = {"height": 48, "width": 64, "num_inference_steps": 4, "output_type": "pt"}
EDIT = {"image": golden_image("square"), "num_inference_steps": 4, "output_type": "pt", "vae_sample_mode": "argmax"}
# Of float32 on two devices, for pixels in [0, 1].
BOUND = 1e-3


def load(**kwargs) -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, processor=load_processor(), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model_of(**kwargs) -> BagelForConditionalGeneration:
    return BagelForConditionalGeneration.from_pretrained(CHECKPOINT, **kwargs)


def noise() -> torch.Tensor:
    return torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))


def drawn(pipe: BagelPipeline, **kwargs) -> torch.Tensor:
    return pipe("a red circle", latents=noise(), **(SMALL | kwargs)).images.cpu()


def edited(pipe: BagelPipeline, **kwargs) -> torch.Tensor:
    """Of all that a pipeline does with its transformer: seeing, thinking, drawing."""
    generator = torch.Generator().manual_seed(0)
    out = pipe("make it green", think=True, max_think_tokens=4, generator=generator, **(EDIT | kwargs))
    return out.images.cpu()


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def on_cpu() -> BagelPipeline:
    return load()


@pytest.fixture(scope="module")
def on_gpu() -> BagelPipeline:
    return load().to(GPU)


@pytest.fixture(scope="module")
def question(on_gpu):
    """A prompt with a picture, on the CPU."""
    return on_gpu.processor.apply_chat_template(
        conversation(["@wide", "what is it?"]),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


class TestSynchronization:
    def test_a_denoising_step_does_not_wait(self, on_gpu):
        """The loop between the first callback and the last."""

        def begin(pipe, step, timestep, tensors):
            torch.cuda.set_sync_debug_mode("error" if step < 5 else "default")
            return tensors

        try:
            for settings in (SMALL, {**SMALL, "guidance_scale": 1.0}, EDIT):
                on_gpu("a red circle", **(settings | {"num_inference_steps": 8}), callback_on_step_end=begin)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @torch.no_grad()
    @pytest.mark.parametrize("parts", [["a red circle"], ["@square", "make it green"]])
    def test_the_pipeline_reads_a_prompt_without_waiting(self, parts, on_gpu):
        segments = encoded(on_gpu, conversation(parts))
        reader = ContextReader(on_gpu.transformer, on_gpu.processor, GPU)
        reader.read([BagelContext()], [segments])
        with no_synchronization():
            reader.read([BagelContext()], [segments])

    @torch.no_grad()
    def test_a_token_is_written_without_waiting(self, on_gpu):
        ids = torch.randint(5, 400, (1, 16), device=GPU)
        cache = on_gpu.transformer(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        step = {"input_ids": ids[:, :1], "position_ids": ids[:, :1], "past_key_values": cache}
        on_gpu.transformer(**step)
        with no_synchronization():
            on_gpu.transformer(**step)


class TestDrawing:
    @pytest.mark.parametrize("draw", [drawn, edited])
    def test_as_on_the_cpu(self, draw, on_cpu, on_gpu):
        assert max_error(draw(on_gpu), draw(on_cpu)) <= BOUND

    def test_generators_of_both_devices(self, on_gpu):
        for device in ("cpu", "cuda"):
            first, again = (
                on_gpu("a", generator=torch.Generator(device).manual_seed(1), **SMALL).images for _ in range(2)
            )
            assert torch.equal(first, again)
            other = on_gpu("a", generator=torch.Generator(device).manual_seed(2), **SMALL).images
            assert max_error(first, other) > 0.01

    @pytest.mark.parametrize("sampled", [False, True])
    def test_plans_follow_generators_of_the_gpu(self, sampled, on_gpu):
        settings = SMALL | {"think": True, "max_think_tokens": 6, "do_sample": sampled, "temperature": 2.0}
        first, again = (on_gpu("a", generator=torch.Generator("cuda").manual_seed(1), **settings) for _ in range(2))
        assert first.texts == again.texts and torch.equal(first.images, again.images)

    def test_batches(self, on_cpu, on_gpu):
        texts = ["a", "a red circle", "two small yellow squares"]
        latents = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(0))
        assert max_error(*(pipe(texts, latents=latents, **SMALL).images for pipe in (on_gpu, on_cpu))) <= BOUND

    def test_threads_share_a_pipeline(self, on_gpu):
        settings = [
            {"num_inference_steps": steps, "guidance_scale": scale} for steps in (3, 5) for scale in (1.0, 4.0)
        ]
        expected = [drawn(on_gpu, **item) for item in settings]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda item: drawn(on_gpu, **item), settings * 3))
        for place, image in enumerate(found):
            assert max_error(image, expected[place % len(settings)]) <= BOUND

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_coarse_types_give_about_the_same_picture(self, dtype):
        shapes = {"num_inference_steps": 10, "output_type": "pt"}
        latents = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
        pictures = []
        for item in (torch.float32, dtype):
            pipe = BagelPipeline.from_pretrained(SHAPES, dtype=item).to(GPU)
            pipe.set_progress_bar_config(disable=True)
            pictures.append(pipe("a large red circle in the middle on a white background", **shapes).images.float())
        assert latents.isfinite().all()
        assert pictures[1].isfinite().all()

    def test_taylorseer(self, on_cpu, on_gpu):
        found = []
        for pipe in (on_cpu, on_gpu):
            pipe.enable_taylorseer(interval=2, warmup_steps=2, max_order=2)
            found.append(drawn(pipe, num_inference_steps=10))
            pipe.disable_taylorseer()
        assert max_error(*found) <= BOUND


class TestMemory:
    @pytest.fixture(scope="class")
    def expected(self, on_gpu) -> tuple[torch.Tensor, torch.Tensor]:
        return drawn(on_gpu), edited(on_gpu)

    def check(self, pipe: BagelPipeline, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
        for _ in range(2):
            assert max_error(drawn(pipe), expected[0]) <= BOUND
            assert max_error(edited(pipe), expected[1]) <= BOUND

    def test_model_offload(self, expected):
        pipe = load()
        pipe.enable_model_cpu_offload()
        self.check(pipe, expected)
        assert pipe.transformer.device.type == "cpu"

    def test_sequential_offload(self, expected):
        pipe = load()
        pipe.enable_sequential_cpu_offload()
        self.check(pipe, expected)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("blocks", [None, 1, 2])
    def test_group_offload(self, blocks, stream, expected):
        pipe = load()
        how = {"offload_type": "leaf_level"} if blocks is None else {"num_blocks_per_group": blocks}
        if stream and blocks == 2:
            how["num_blocks_per_group"] = 1
            how["record_stream"] = True
        pipe.enable_group_offload(GPU, use_stream=stream, **how)
        self.check(pipe, expected)

    def test_layerwise_casting(self, expected):
        pipe = load().to(GPU)
        pipe.enable_layerwise_casting()
        assert 0 < (drawn(pipe) - expected[0]).abs().mean() <= 0.1

    def test_a_map_over_gpu_and_cpu(self, expected):
        """As `device_map="auto"` gives it when the model does not fit."""
        devices = {"": 0, "model.language_model.layers.1": "cpu", "lm_head": "cpu"}
        model = model_of(device_map=devices)
        pipe = load(transformer=model)
        pipe.vae.to(GPU)
        self.check(pipe, expected)

    def test_auto_map_with_a_bound(self, expected, tmp_path):
        model = model_of(device_map="auto", max_memory={0: 700_000, "cpu": 10**9}, offload_folder=tmp_path)
        assert len({str(device) for device in model.hf_device_map.values()}) > 1
        pipe = load(transformer=model)
        pipe.vae.to(GPU)
        self.check(pipe, expected)

    def test_balanced_map_of_the_pipeline(self, expected):
        self.check(load(device_map="balanced"), expected)

    def test_a_map_to_the_gpu(self, expected):
        self.check(load(device_map="cuda"), expected)

    @pytest.mark.parametrize("quantize", QUANTIZATIONS, ids=lambda quantize: quantize.__name__)
    def test_quantized(self, quantize, expected):
        pipe = load(quantization_config=quantize(), dtype=torch.bfloat16).to(GPU)
        assert quantized_layers(pipe.transformer)
        assert 0 < (drawn(pipe).float() - expected[0]).abs().mean() <= 0.1

    def test_float8_of_torchao_computes_in_float8(self):
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Float8DynamicActivationFloat8WeightConfig())
        pipe = BagelPipeline.from_pretrained(SHAPES, dtype=torch.bfloat16, quantization_config=config).to(GPU)
        pipe.set_progress_bar_config(disable=True)
        assert pipe("a red circle", num_inference_steps=4, output_type="pt").images.isfinite().all()


class TestWriting:
    def test_as_on_the_cpu(self, question, on_cpu, on_gpu):
        settings = {"max_new_tokens": 8, "do_sample": False}
        expected = on_cpu.transformer.generate(**question, **settings)
        assert on_gpu.transformer.generate(**question.to(GPU), **settings).tolist() == expected.tolist()

    @pytest.mark.parametrize("inputs", ["text", "picture"])
    def test_a_static_cache_which_the_library_compiles(self, inputs, question, on_gpu):
        model = on_gpu.transformer
        given = question.to(GPU) if inputs == "picture" else on_gpu.processor(text="a", return_tensors="pt").to(GPU)
        settings = {"max_new_tokens": 8, "do_sample": False}
        expected = model.generate(**given, **settings)
        found = model.generate(**given, **settings, cache_implementation="static")
        assert found.tolist() == expected.tolist()
        torch._dynamo.reset()

    @pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
    def test_attention_implementations(self, implementation, question, on_gpu):
        model = model_of(attn_implementation={"text_config": implementation, "vision_config": "sdpa"}).to(GPU)
        with torch.no_grad():
            found, expected = (m(**question.to(GPU)).logits for m in (model, on_gpu.transformer))
        assert max_error(found, expected) <= 1e-4


class TestCompiling:
    def test_compiled_layers_draw_the_same(self, on_gpu):
        pipe = load().to(GPU)
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        for draw in (drawn, edited):
            assert max_error(draw(pipe), draw(on_gpu)) <= BOUND
        torch._dynamo.reset()


class TestTraining:
    @pytest.fixture
    def collator(self, on_gpu) -> BagelDataCollator:
        none = {
            "text_dropout": 0.0,
            "vit_dropout": 0.0,
            "vae_dropout": 0.0,
            "vae_sample_mode": "argmax",
            "return_layout": True,
        }
        return BagelDataCollator(on_gpu.processor, vae=on_gpu.vae, generator=torch.Generator().manual_seed(0), **none)

    @pytest.fixture
    def batch(self, collator) -> dict:
        return collator(training_samples("talk", "look", "draw", "edit"))

    @pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_losses_and_gradients_as_on_the_cpu(self, implementation, checkpointing, batch):
        found = []
        for device in ("cpu", "cuda"):
            attention = implementation if device == "cuda" else "sdpa"
            model = model_of(attn_implementation={"text_config": attention, "vision_config": "sdpa"}).to(device)
            model.train()
            if checkpointing:
                model.activation_checkpointing_enable()
            out = model(**batch.to(device))
            out.loss.backward()
            found.append(
                (out.loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            )
        (loss, gradients), (loss_on_gpu, gradients_on_gpu) = found
        assert abs(loss - loss_on_gpu) <= 1e-4
        assert gradients.keys() == gradients_on_gpu.keys()
        for name, gradient in gradients.items():
            assert max_error(gradients_on_gpu[name], gradient) <= 1e-4, name

    def test_a_forward_of_a_batch_with_its_layout_does_not_wait(self, batch):
        model = model_of().to(GPU).train()
        moved = batch.to(GPU)
        model(**moved).loss.backward()
        with no_synchronization():
            model(**moved).loss.backward()

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_loader_encodes_on_the_gpu(self, workers, collator):
        samples = training_samples("draw", "edit", "look") * 4
        loader = BagelDataLoader(samples, collator, batch_size=2, num_workers=workers)
        model = model_of().to(GPU).train()
        for _, batch in zip(range(2), loader, strict=False):
            assert model(**batch.to(GPU)).loss.isfinite()

    @pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
    def test_the_trainer(self, precision, collator, tmp_path):
        from transformers import TrainingArguments

        model = model_of()
        model.add_adapter(LoraConfig(r=4, target_modules=LORA_TARGETS["gen"]))
        args = TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            report_to=[],
            remove_unused_columns=False,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            gradient_checkpointing=True,
            logging_steps=1,
            save_strategy="no",
        )
        samples = training_samples("draw", "edit", "look", "talk") * 4
        trainer = BagelTrainer(model=model, args=args, train_dataset=samples, data_collator=collator)
        result = trainer.train()
        assert np.isfinite(result.training_loss)
        assert model.device.type == "cuda"


def run(*command: str) -> Callable[[], str]:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_commands_take_the_gpu_by_themselves(tmp_path):
    picture = str(tmp_path / "drawn.png")
    command = (sys.executable, "-m", "diffusers_bagel")
    prompt = "a large red circle in the middle on a white background"
    run(*command, "draw", prompt, "--model", str(SHAPES), "-o", picture)
    assert run(*command, "ask", picture, "what colour is the circle?", "--model", str(SHAPES)).strip() == "red"


@pytest.mark.parametrize("script", ["train_lora.py", "train_full.py"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_scripts(script, precision, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("wide", "square", "tall"):
        golden_image(name).convert("RGB").resize((64, 64)).save(pictures / f"{name}.png")
    sizes = ["--instance_data_dir", str(pictures), "--instance_prompt", "a red circle", "--max_train_steps", "3"]
    places = ["--pretrained_model_name_or_path", str(SHAPES), "--output_dir", str(tmp_path / "out")]
    settings = ["--mixed_precision", precision, "--gradient_checkpointing", "--dataloader_num_workers", "1"]
    run(sys.executable, f"examples/{script}", *sizes, *places, *settings)
