"""Runs of the training scripts in this process, on the tiny checkpoint and eight pictures."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelForConditionalGeneration


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import tiny_checkpoint  # noqa: E402  # the scripts are no package


SHAPES = [f"{colour} {shape}" for colour in ("red", "green", "blue", "black") for shape in ("circle", "square")]
PROMPT = "a red circle"

Train = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def picture(name: str) -> Image.Image:
    """`"red circle"` and the like."""
    colour, shape = name.split()
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)([16, 16, 48, 48], fill=colour)
    return image


def save_pictures(folder: Path) -> list[str]:
    """The eight pictures in a folder; their names in it."""
    folder.mkdir(exist_ok=True)
    names = [f"{shape.replace(' ', '_')}.png" for shape in SHAPES]
    for shape, name in zip(SHAPES, names, strict=True):
        picture(shape).save(folder / name)
    return names


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def image(path: str, key: str = "image") -> dict[str, str]:
    return {"type": "image", key: path}


def talk(user: list[dict], assistant: list[dict], **columns: Any) -> dict[str, Any]:
    """A row of two messages."""
    turns = (("user", user), ("assistant", assistant))
    return {**columns, "messages": [{"role": role, "content": content} for role, content in turns]}


def arguments(**settings: Any) -> list[str]:
    """`ema=True, max_tokens=40, freeze=["vit"]` as on the command line; `None` leaves one out."""
    line = []
    for name, value in settings.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            line += [f"--{name}", *map(str, values)]
    return line


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tiny_checkpoint.py", str(folder)])
        tiny_checkpoint.main()
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    save_pictures(folder)
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> str:
    """Every second one edits, the others answer: between them they use all towers."""
    folder = tmp_path_factory.mktemp("conversations")
    names = save_pictures(folder)
    rows = [
        talk([image(name), text("what is this?")], [text(f"a {shape}")], id=name)
        if index % 2
        else talk([image(name), text("turn it")], [image(names[index - 1])], id=name)
        for index, (shape, name) in enumerate(zip(SHAPES, names, strict=True))
    ]
    return write_lines(folder / "conversations.jsonl", rows)


@pytest.fixture(scope="session")
def defaults(checkpoint, pictures) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": checkpoint,
        "instance_data_dir": pictures,
        "instance_prompt": "a shape",
        "cpu": True,
        "train_batch_size": 2,
        "max_train_steps": 2,
        # High enough for every trained weight to move.
        "learning_rate": 1e-3,
        "report_to": "none",
        # Measuring it takes a while.
        "peak_tflops": 1,
        "validation_inference_steps": 2,
        "validation_size": [64, 64],
        "num_validation_images": 1,
    }


@pytest.fixture(scope="session")
def train(defaults) -> Train:
    """`train(train_lora, output_dir, rank=4)` runs a script; data of another kind replaces the folder of pictures."""

    def run(script: ModuleType, output_dir: Path, **settings: Any) -> Path:
        if {"train_data_file", "dataset_name"} & set(settings):
            settings = {"instance_data_dir": None, "instance_prompt": None} | settings
        AcceleratorState._reset_state(True)
        script.main(script.parse_args(arguments(**(defaults | settings), output_dir=output_dir)))
        return output_dir

    return run


@contextmanager
def full_disk(step: int) -> Iterator[None]:
    """The disk is full in the middle of the checkpoint of a step: its weights are there, the rest is cut off."""
    save = torch.save

    def save_or_fail(state: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(file, Path) and f"checkpoint-{step}" in str(file):
            file.write_bytes(b"half")
            raise OSError("No space left on device")
        save(state, file, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
        patch.setattr(torch, "save", save_or_fail)
        yield


@contextmanager
def not_finite(*steps: int, part: str = "loss", accumulation: int = 1) -> Iterator[None]:
    """The loss of some steps, or their gradient alone, is NaN."""
    forward, calls = BagelForConditionalGeneration.forward, itertools.count()

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        if kwargs.get("loss_totals") is not None and next(calls) // accumulation + 1 in steps:
            # The root of zero is finite, its derivative is not.
            nothing = (0 * outputs.loss).sqrt()
            outputs.loss = outputs.loss + nothing * (float("nan") if part == "loss" else 1)
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BagelForConditionalGeneration, "forward", broken)
        yield


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, to see that it was left alone."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def counted_calls(kind: str) -> Iterator[list[int]]:
    """How often modules of a class, given by the end of its name, run forward: `calls[0]`."""
    calls = [0]

    def count(module: torch.nn.Module, *_: Any) -> None:
        calls[0] += type(module).__name__.endswith(kind)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


def saved_weights(output_dir: Path) -> Tensors:
    """Of a pipeline's model, or of a LoRA."""
    lora = output_dir / "pytorch_lora_weights.safetensors"
    if lora.exists():
        return load_file(lora)
    return BagelForConditionalGeneration.from_pretrained(output_dir / "transformer").state_dict()


def checkpoint_state(path: Path) -> Tensors:
    """All tensors of a checkpoint by their place: weights, moments, averages, random state."""
    whole = path.parent / f"{path.name}.pt"
    dcp_to_torch_save(path / "weights", whole)
    state = {"weights": torch.load(whole), "own": torch.load(path / "rank_0.pt")}
    whole.unlink()
    return dict(_tensors(state, ""))


def _tensors(state: Any, place: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        yield place, state
    elif isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _tensors(value, f"{place}/{key}")


def assert_same(actual: Tensors, expected: Tensors) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def changed(actual: Tensors, expected: Tensors) -> set[str]:
    assert actual.keys() == expected.keys()
    return {name for name in expected if not torch.equal(actual[name], expected[name])}


def checkpoints(output_dir: Path) -> list[str]:
    """The finished ones."""
    return sorted(path.name for path in output_dir.glob("checkpoint-*"))


def validation_picture(output_dir: Path, step: int) -> bytes:
    return Image.open(output_dir / "validation" / f"step_{step}_0.png").tobytes()


def drawn(pipe: BagelPipeline, prompt: str = PROMPT) -> bytes:
    """What the validation draws."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, height=64, width=64, num_inference_steps=2, generator=generator).images[0].tobytes()


def card_text(output_dir: Path) -> str:
    return (output_dir / "README.md").read_text(encoding="utf-8")


def last_metrics(output_dir: Path) -> dict[str, float]:
    """Of the last step, by the model card."""
    lines = [line.removeprefix("- ").split(", last step: ") for line in card_text(output_dir).splitlines()]
    return {line[0]: float(line[1]) for line in lines if len(line) == 2}


def load_card(output_dir: Path) -> ModelCard:
    return ModelCard.load(output_dir / "README.md")
