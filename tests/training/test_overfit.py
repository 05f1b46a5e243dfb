"""A small model learns eight samples of each task by heart, and says and draws them through the public interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageDraw

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, load_processor
from tests.processes import run_script
from transformers_bagel import LORA_TARGETS, BagelConfig, BagelDataCollator, BagelForConditionalGeneration


pytestmark = pytest.mark.slow

SHAPES = [(colour, shape) for colour in ("red", "green", "blue", "black") for shape in ("circle", "square")]
# Of the latents' values; two of the eight pictures are 0.01 apart at least.
CLOSE = 0.008


def picture(colour: str, shape: str, outline: bool = False) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    style = {"outline": colour, "width": 6} if outline else {"fill": colour}
    (draw.ellipse if shape == "circle" else draw.rectangle)([16, 16, 48, 48], **style)
    return image


def sample(question: list, answer) -> dict:
    def part(item) -> dict:
        return {"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "image": item}

    turns = (("user", [part(item) for item in question]), ("assistant", [part(answer)]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def drawings(outline: bool = False) -> list[dict]:
    return [sample([f"a {colour} {shape}"], picture(colour, shape, outline)) for colour, shape in SHAPES]


def new_pipeline() -> BagelPipeline:
    """A pipeline whose model is wide enough to learn something, and has random weights."""
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, processor=load_processor())
    config = pipe.transformer.config.to_dict()
    config["text_config"] |= {"hidden_size": 128, "intermediate_size": 256}
    torch.manual_seed(0)
    pipe.transformer = BagelForConditionalGeneration(BagelConfig.from_dict(config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def collator(pipe: BagelPipeline, cache_dir: Path) -> BagelDataCollator:
    # What is learned by heart is conditioned on everything, so nothing is dropped.
    return BagelDataCollator(
        pipe.processor,
        vae=pipe.vae,
        vae_sample_mode="argmax",
        text_dropout=0.0,
        vit_dropout=0.0,
        vae_dropout=0.0,
        timestep_shift=3.0,
        generator=torch.Generator().manual_seed(0),
        cache_dir=cache_dir,
    )


def train(model, samples: list[dict], collate: BagelDataCollator, steps: int, learning_rate: float) -> float:
    """The mean loss of the last ten steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**collate(samples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-10:]) / 10


def draw(pipe: BagelPipeline, prompt: str, image=None, output_type: str = "latent"):
    return pipe(
        prompt,
        image=image,
        height=64,
        width=64,
        guidance_scale=1.0,
        num_inference_steps=25,
        vae_sample_mode="argmax",
        generator=torch.Generator().manual_seed(1),
        output_type=output_type,
    ).images[0]


def assert_drawn(drawn: torch.Tensor, targets: torch.Tensor, index: int) -> None:
    """The drawing is the target, and not one of the others."""
    errors = (drawn - targets).square().mean((1, 2))
    assert errors[index] <= CLOSE, errors
    assert errors.argmin() == index


def test_text_to_image_then_lora_for_another_style(tmp_path):
    pipe = new_pipeline()
    collate = collator(pipe, tmp_path / "latents")
    assert train(pipe.transformer, 4 * drawings(), collate, 400, 2e-3) <= 0.01
    targets = collate(drawings())["latents"].unflatten(0, (8, -1))
    for index in (0, 3, 6):
        assert_drawn(draw(pipe, " ".join(("a", *SHAPES[index]))), targets, index)

    pipe.save_pretrained(tmp_path / "base")
    model = pipe.transformer
    before = draw(pipe, "a red circle")
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=LORA_TARGETS["gen"]))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained < 0.02 * sum(parameter.numel() for parameter in model.parameters())
    assert train(model, 4 * drawings(outline=True), collate, 400, 1e-2) <= 0.015
    targets = collate(drawings(outline=True))["latents"].unflatten(0, (8, -1))
    for index in (0, 3, 6):
        assert_drawn(draw(pipe, " ".join(("a", *SHAPES[index]))), targets, index)

    pipe.save_lora_weights(
        tmp_path / "lora",
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from tests.training.test_overfit import draw, BagelPipeline\n"
        "pipe = BagelPipeline.from_pretrained(sys.argv[1]); pipe.load_lora_weights(sys.argv[2])\n"
        "draw(pipe, 'a red circle', output_type='pil').save(sys.argv[3])"
    )
    image = draw(pipe, "a red circle", output_type="pil")
    paths = [str(tmp_path / name) for name in ("base", "lora", "drawn.png")]
    run_script(script, *paths)
    # Weights that were read from a file lie elsewhere in memory, and the matrix products add up in another order.
    difference = np.asarray(Image.open(paths[2]), dtype=int) - np.asarray(image, dtype=int)
    assert abs(difference).max() <= 1
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe, "a red circle"), before)


def test_editing(tmp_path):
    pipe = new_pipeline()
    collate = collator(pipe, tmp_path)
    # Each becomes the third after it: the answer cannot be read off the image alone without having learned it.
    pairs = [(picture(*SHAPES[index]), picture(*SHAPES[(index + 3) % 8])) for index in range(8)]
    samples = [sample([source, "turn it"], target) for source, target in pairs]
    assert train(pipe.transformer, 2 * samples, collate, 400, 2e-3) <= 0.01
    batch = collate(samples)
    latents = batch["latents"].split(batch["latent_grid_hw"].prod(-1).tolist())
    targets = torch.stack([part for part, level in zip(latents, batch["timesteps"], strict=True) if level > 0])
    for index in (0, 3, 6):
        assert_drawn(draw(pipe, "turn it", image=pairs[index][0]), targets, index)


def test_understanding(tmp_path):
    pipe = new_pipeline()
    samples = [sample([picture(*shape), "what is this?"], " ".join(("a", *shape))) for shape in SHAPES]
    assert train(pipe.transformer, samples, collator(pipe, tmp_path), 200, 2e-3) <= 0.01
    for index in range(8):
        inputs = pipe.processor.apply_chat_template(
            samples[index]["messages"][:1],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = pipe.transformer.generate(**inputs, max_new_tokens=20)
        answer = pipe.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == " ".join(("a", *SHAPES[index]))
