"""The kinds of cases: what is broken, what is then tried, and what a right result is."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convert_bagel_to_hf import main as convert
from merge_lora import main as merge
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, golden_image, load_model, load_processor, training_samples
from tests.fuzz.mutations import mutate_bytes, mutate_file, mutate_json, odd_value
from transformers_bagel import LORA_TARGETS, BagelDataCollator, BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.loading import module_name


DRAWING = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "np"}


class WrongResultError(Exception):
    """Something was done, and what came out is not right."""


class RefusedError(ValueError):
    """A script has refused something in its own words."""


def expect(condition: Any, what: str) -> None:
    if not condition:
        raise WrongResultError(what)


class World:
    """What is broken: a small model in both layouts, an adapter, images and messages. Cases take copies."""

    def __init__(self, folder: Path):
        self.model, self.processor = load_model().eval(), load_processor()
        self.pipe = BagelPipeline.from_pretrained(CHECKPOINT, transformer=self.model, processor=self.processor)
        self.pipe.set_progress_bar_config(disable=True)
        self.own, self.original, self.adapter = folder / "own", folder / "original", folder / "adapter"
        self.pipe.save_pretrained(folder / "pipeline")
        self.model.save_pretrained(self.own)
        self.processor.save_pretrained(self.own)
        shutil.copytree(CHECKPOINT, self.original)
        adapted = copy.deepcopy(self.model)
        torch.manual_seed(0)
        adapted.add_adapter(LoraConfig(r=2, target_modules=LORA_TARGETS["gen"], init_lora_weights=False))
        adapted.save_pretrained(self.adapter)
        BagelPipeline.save_lora_weights(
            self.adapter,
            transformer_lora_layers=get_peft_model_state_dict(adapted),
            transformer_lora_adapter_metadata=adapted.peft_config["default"].to_dict(),
        )
        self.collator = BagelDataCollator(self.processor, vae=self.pipe.vae)
        self.samples = training_samples("talk", "look", "draw", "edit", "chat")
        stream = io.BytesIO()
        golden_image("wide").convert("RGB").save(stream, "JPEG")
        self.pictures = [(CHECKPOINT.parent / "inputs" / "tall.png").read_bytes(), stream.getvalue()]

    def copy_of(self, folder: Path, target: Path) -> Path:
        """A folder whose files are those of another, until one is broken."""
        shutil.copytree(folder, target, copy_function=os.link)
        return target


def broken_file(folder: Path, rng: random.Random, *endings: str) -> str:
    files = sorted(file for file in folder.iterdir() if file.name.endswith(endings))
    return mutate_file(rng.choice(files), rng)


def check_model(model: Any, files: list[Path]) -> None:
    """Every number is one that the files give, and the model speaks."""
    stored = {module_name(name): value for file in files for name, value in load_file(file).items()}
    for name, tensor in model.state_dict().items():
        expect(name in stored, f"{name} is in no file")
        expect(torch.equal(tensor.nan_to_num(), stored[name].to(tensor.dtype).nan_to_num()), f"{name} is another")
    # Finite numbers that no training makes overflow by themselves.
    if all(value.abs().max() < 1e3 for value in stored.values() if value.is_floating_point() and value.numel()):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        expect(logits.isfinite().all(), "NaN from finite weights")


def check_tokens(features: Any, vocabulary: int) -> None:
    ids = torch.as_tensor(features["input_ids"])
    expect(ids.ndim == 2 and ids.numel() > 0, "no tokens")
    expect(((ids >= 0) & (ids < vocabulary)).all(), "ids outside of the vocabulary")
    for name in ("pixel_values", "latents", "noise"):
        if name in features:
            expect(torch.isfinite(torch.as_tensor(features[name])).all(), f"{name} not finite")


def model_files(world: World, folder: Path, rng: random.Random) -> tuple[str, Callable]:
    layout = rng.choice([world.own, world.original])
    files = ["config.json"] * 3 + (["model.safetensors"] if layout == world.own else ["ema.safetensors"])
    others = {"generation_config.json", "llm_config.json", "vit_config.json", "model.safetensors.index.json"}
    files += sorted(name for name in others if (layout / name).exists())
    copied = world.copy_of(layout, folder / "model")
    what = broken_file(copied, rng, rng.choice(files))

    def load() -> None:
        loader = rng.choice([BagelForConditionalGeneration, BagelForConditionalGeneration, BagelPipeline])
        if loader is BagelPipeline and layout == world.original:
            loaded = BagelPipeline.from_pretrained(copied, processor=world.processor).transformer
        else:
            loaded = BagelForConditionalGeneration.from_pretrained(copied)
        weights = [file for file in copied.glob("*.safetensors") if file.name != "ae.safetensors"]
        check_model(loaded.eval(), weights)

    return f"{layout.name}, {what}", load


def processor_files(world: World, folder: Path, rng: random.Random) -> tuple[str, Callable]:
    layout = rng.choice([world.own, world.original])
    names = [
        *("tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
        *("vocab.json", "config.json", "chat_template.jinja"),
    ]
    copied = world.copy_of(layout, folder / "processor")
    what = broken_file(copied, rng, *(name for name in names if (layout / name).exists()))

    def load() -> None:
        processor = BagelProcessor.from_pretrained(copied)
        features = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        check_tokens(features, 2**31)

    return f"{layout.name}, {what}", load


def adapters(world: World, folder: Path, rng: random.Random) -> tuple[str, Callable]:
    copied = world.copy_of(world.adapter, folder / "adapter")
    own = rng.random() < 0.5
    names = ["pytorch_lora_weights.safetensors"] if own else ["adapter_model.safetensors", "adapter_config.json"]
    what = broken_file(copied, rng, *names)

    def load() -> None:
        transformer = copy.deepcopy(world.model)
        pipe = BagelPipeline(**(world.pipe.components | {"transformer": transformer}))
        before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
        try:
            pipe.load_lora_weights(copied, weight_name=names[0], adapter_name="one")
        except BaseException:
            after = transformer.state_dict()
            expect(after.keys() == before.keys(), "a refused adapter has left layers")
            expect(all(torch.equal(after[name], tensor) for name, tensor in before.items()), "weights have changed")
            raise
        stored = load_file(copied / names[0])
        loaded = [tensor for name, tensor in transformer.state_dict().items() if ".lora_" in name]
        expect(len(loaded) == len([name for name in stored if ".lora_" in name]), "a part of the adapter is missing")
        expect(all(tensor.isfinite().all() for tensor in loaded), "an adapter that is not finite")

    return what, load


def images(world: World, folder: Path, rng: random.Random) -> tuple[str, Callable]:
    kind = rng.choice(["bytes", "bytes", "base64", "array", "value", "text"])
    content, what = mutate_bytes(rng.choice(world.pictures), rng)
    given: Any = content
    if kind == "bytes":
        given = str(folder / f"broken{rng.choice(['.png', '.jpg', ''])}")
        Path(given).write_bytes(content)
    elif kind == "base64":
        text = base64.b64encode(content).decode()
        given = rng.choice(["", "data:image/png;base64,", "data:image/", "data:"]) + text
    elif kind == "array":
        shape = [rng.choice([0, 1, 2, 3, 4, 16, 40]) for _ in range(rng.choice([1, 2, 3, 3, 3, 4]))]
        dtype = rng.choice([np.uint8, np.float32, np.float64, np.int16, np.bool_, np.complex64, np.object_])
        given = (np.random.default_rng(rng.randrange(2**32)).random(shape) * rng.choice([1, 2, 255, -1])).astype(dtype)
        what = f"{dtype.__name__} {shape}"
        if rng.random() < 0.3 and dtype is not np.object_:
            given = torch.from_numpy(given)
    elif kind == "value":
        given = odd_value(rng)
        what = f"{given!r}"[:60]
    else:
        given = rng.choice(
            ["http://", "http://[::1", "https://\x00", "file:///etc/hostname", "data:,", "..", "/", "\x00"]
        )
        what = repr(given)

    def load() -> None:
        features = world.processor.image_processor(given, return_vae_pixel_values=True, return_tensors="pt")
        expect(torch.isfinite(features["pixel_values"]).all(), "pixels that are not finite")
        expect(len(features["pixel_values"]) == features["image_grid_hw"].prod(-1).sum(), "another number of patches")

    return f"{kind}, {what}", load


def messages(world: World, folder: Path, rng: random.Random) -> tuple[str, Callable]:
    sample = rng.choice(world.samples)
    broken, what = mutate_json(_described(sample), rng)
    broken = _with_images(broken)
    way = rng.choice(["template", "drawing", "collator", "pipeline"])

    def use() -> None:
        spoken = broken.get("messages") if isinstance(broken, dict) else broken
        if way == "collator":
            batch = world.collator([broken])
            check_tokens(batch, world.model.config.text_config.vocab_size)
        elif way == "pipeline":
            image = world.pipe(messages=spoken, **DRAWING).images
            expect(np.isfinite(image).all(), "a picture that is not finite")
        else:
            features = world.processor.apply_chat_template(
                spoken,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                generation_mode="image" if way == "drawing" else "text",
                sanitize_control_tokens=rng.random() < 0.5,
                padding=True,
            )
            check_tokens(features, world.model.config.text_config.vocab_size)

    return f"{way}, {what}", use


def _described(value: Any) -> Any:
    """Messages without images, which JSON does not know: their names stand for them."""
    if isinstance(value, dict):
        return {key: _described(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_described(item) for item in value]
    return value if isinstance(value, str) else "@square"


def _with_images(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_images(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_images(item) for item in value]
    return golden_image("square") if value == "@square" else value


def arguments(world: World, folder: Path, rng: random.Random) -> tuple[str, Callable]:
    known = {
        "prompt": ["x", ["x", "y"], "", [""]],
        "image": [golden_image("square"), [golden_image("square")], None],
        "height": [32, 48, 33],
        "width": [32, 64, 1024],
        "num_inference_steps": [1, 2],
        "sigmas": [[1.0, 0.5], [0.5, 1.0], [], [1], (1.0,), torch.tensor([1.0])],
        "guidance_scale": [1.0, 4, 0],
        "image_guidance_scale": [1.0, 2.0],
        "cfg_interval": [(0.0, 1.0), [0.4, 1.0], (1.0, 0.0)],
        "cfg_renorm_type": ["global", "channel", "text_channel"],
        "cfg_renorm_min": [0.0, 1, 0.5],
        "guidance_tolerance": [0.0, 1, 0.01],
        "think": [True, False],
        "max_think_tokens": [2, 3],
        "do_sample": [True, False],
        "temperature": [0.3, 1],
        "num_images_per_prompt": [1, 2],
        "generator": [torch.Generator(), [torch.Generator()]],
        "latents": [torch.zeros(1, 4, 16), torch.full((1, 4, 16), float("nan")), torch.zeros(1, 4, 15)],
        "vae_sample_mode": ["sample", "argmax"],
        "output_type": ["pil", "np", "pt", "latent"],
        "return_dict": [True, False],
        "attention_kwargs": [{}, {"scale": 0.5}, {"scale": "x"}],
        "callback_on_step_end": [lambda pipe, step, timestep, tensors: tensors, lambda *args: None],
        "callback_on_step_end_tensor_inputs": [["latents"], ["x"], []],
    }
    names = rng.sample(sorted(known), rng.choice([1, 1, 2, 3]))
    given = {name: odd_value(rng) if rng.random() < 0.5 else rng.choice(known[name]) for name in names}

    def draw() -> None:
        found = world.pipe(**({"prompt": "x", "max_think_tokens": 3} | DRAWING | given))
        pictures = found[0] if isinstance(found, tuple) else found.images
        for picture in pictures:
            numbers = picture.numpy() if isinstance(picture, torch.Tensor) else np.asarray(picture)
            expect(np.isfinite(numbers).all(), "a picture that is not finite")

    return ", ".join(f"{name}={value!r:.60}" for name, value in given.items()), draw


def run_command(main: Callable[[list[str]], int], arguments: list[Path | str], target: Path) -> None:
    """A script of conversion/, whose last words are an error of its own."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(argument) for argument in arguments])
    if code:
        message = said.getvalue().strip().splitlines()[-1]
        expect(not target.exists(), f"something is left of what was refused: {message}")
        raise RefusedError(message[:500])


def merges(world: World, folder: Path, rng: random.Random) -> tuple[str, Callable]:
    copied = world.copy_of(world.adapter, folder / "adapter")
    (copied / "pytorch_lora_weights.safetensors").unlink()
    what = broken_file(copied, rng, "adapter_model.safetensors", "adapter_config.json", "adapter_config.json")
    target = folder / "merged"

    def run() -> None:
        run_command(merge, [world.own, target, "--loras", copied], target)
        stored = load_file(copied / "adapter_model.safetensors")
        before, after = (load_file(place / "model.safetensors") for place in (world.own, target))
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        expect(before.keys() == after.keys(), "other tensors")
        expect(all(after[name].isfinite().all() for name in changed), "numbers that are not finite")
        pairs = [(stored[name.replace("lora_B", "lora_A")], stored[name]) for name in stored if "lora_B" in name]
        alpha = json.loads((copied / "adapter_config.json").read_text()).get("lora_alpha", 8)
        merged = sum(bool(alpha) and bool((b.double() @ a.double()).any()) for a, b in pairs)
        expect(len(changed) == merged, "a part was not merged")

    return what, run


def conversions(world: World, folder: Path, rng: random.Random) -> tuple[str, Callable]:
    copied = world.copy_of(world.original, folder / "original")
    what = broken_file(copied, rng, ".json", ".safetensors", ".txt")
    target = folder / "converted"

    def run() -> None:
        run_command(convert, [copied, target], target)
        check_model(BagelForConditionalGeneration.from_pretrained(target).eval(), [copied / "ema.safetensors"])

    return what, run


KINDS: dict[str, Callable[[World, Path, random.Random], tuple[str, Callable[[], None]]]] = {
    "model files": model_files,
    "processor files": processor_files,
    "adapters": adapters,
    "images": images,
    "messages": messages,
    "arguments": arguments,
    "merges": merges,
    "conversions": conversions,
}
# How many of a hundred cases are of a kind: the slow ones are fewer.
SHARES = {
    "model files": 20,
    "processor files": 10,
    "adapters": 10,
    "images": 20,
    "messages": 17,
    "arguments": 15,
    "merges": 3,
    "conversions": 5,
}
