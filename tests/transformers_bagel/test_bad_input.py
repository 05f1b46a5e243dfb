"""Bad images, placeholders, messages, contexts and checkpoints are refused by name, before any heavy work."""

from __future__ import annotations

import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.conftest import CHECKPOINT, GOLDEN, conversation, golden_image, load_model, load_processor
from transformers_bagel import BagelForConditionalGeneration, BagelImageProcessor, BagelProcessor
from transformers_bagel.image_processing_bagel import to_rgb


REFUSED = (ValueError, TypeError, OSError)
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
KEPT = "<|vision_start|><|vision_pad|><|vision_end|>"
PNG = (GOLDEN / "inputs" / "wide.png").read_bytes()


def written(folder: Path, content: bytes, name: str = "image.png") -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def half_jpeg() -> bytes:
    stream = io.BytesIO()
    golden_image("wide").save(stream, format="JPEG")
    return stream.getvalue()[: len(stream.getvalue()) // 2]


def closed_image() -> Image.Image:
    image = golden_image("wide")
    image.close()
    return image


# Each makes one bad image, given an empty folder.
def fifo(folder: Path) -> str:
    """What nobody writes into: a reader would wait for ever."""
    os.mkfifo(folder / "fifo.png")
    return str(folder / "fifo.png")


BAD_IMAGES = {
    "number": lambda folder: 1,
    "dict": lambda folder: {"pixels": 1},
    "bytes": lambda folder: PNG,
    "words": lambda folder: "a red circle",
    "path_to_nothing": lambda folder: str(folder / "absent.png"),
    "path_to_folder": lambda folder: str(folder),
    "path_to_fifo": lambda folder: fifo(folder),
    "endless_line": lambda folder: Image.new("L", (1_000_001, 1)),
    "endless_column": lambda folder: np.zeros((89_000_000, 1), np.uint8),
    "path_to_text": lambda folder: written(folder, b"not an image"),
    "path_object_to_text": lambda folder: Path(written(folder, b"not an image")),
    "path_to_empty_file": lambda folder: written(folder, b""),
    "closed": lambda folder: closed_image(),
    "array_of_one_axis": lambda folder: np.zeros(5),
    "array_of_five_channels": lambda folder: np.zeros((8, 8, 5), np.uint8),
    "array_of_words": lambda folder: np.full((8, 8, 3), "a"),
    "array_of_nothing": lambda folder: np.full((8, 8, 3), None),
    "array_of_nan": lambda folder: np.full((8, 8, 3), np.nan),
    "array_out_of_range": lambda folder: np.full((8, 8, 3), 300),
    "tensor_out_of_range": lambda folder: torch.full((3, 8, 8), -1.0),
    # An image in [0, 1] that was resized and not cut off, and not one in [-1, 1] or of bytes.
    "array_just_below_zero": lambda folder: np.linspace(-0.02, 0.98, 64).reshape(8, 8),
    "array_just_above_one": lambda folder: np.linspace(0, 1.02, 64).reshape(8, 8),
    "array_of_negative_integers": lambda folder: np.full((8, 8), -1),
    "batch_in_a_batch": lambda folder: np.zeros((1, 1, 8, 8, 3), np.uint8),
    # Grays of 8 bits or of 16, nothing says which.
    "integers_of_unknown_depth": lambda folder: Image.fromarray(np.full((8, 8), 200, np.int32)),
    "integers_out_of_range": lambda folder: Image.fromarray(np.full((8, 8), 65536, np.int32)),
    "integers_below_zero": lambda folder: Image.fromarray(np.full((8, 8), -1, np.int32)),
    "floats_out_of_range": lambda folder: Image.fromarray(np.full((8, 8), 200, np.float32)),
    "floats_of_nan": lambda folder: Image.fromarray(np.full((8, 8), np.nan, np.float32)),
    "zero_sized": lambda folder: Image.new("RGB", (0, 5)),
    "zero_sized_array": lambda folder: np.zeros((0, 5, 3), np.uint8),
    "zero_sized_tensor": lambda folder: torch.zeros(3, 0, 5),
    "truncated": lambda folder: Image.open(written(folder, PNG[: len(PNG) // 2])),
    "path_to_truncated_png": lambda folder: written(folder, PNG[: len(PNG) // 2]),
    "path_to_truncated_jpeg": lambda folder: written(folder, half_jpeg(), "image.jpg"),
}

# Each makes one image of 64 x 64 pixels.
LARGE_IMAGES = {
    "pil": lambda: golden_image("square"),
    "path": lambda: str(GOLDEN / "inputs" / "square.png"),
    "array": lambda: np.zeros((64, 64, 3), np.uint8),
    "tensor": lambda: torch.zeros(3, 64, 64),
}

BAD_MESSAGES: dict[str, Any] = {
    "empty": [],
    "no_messages": [[]],
    "words": "hello",
    "dict": {"role": "user", "content": "a"},
    "generator": (message for message in conversation(["a"])),
    "nothing": [None],
    "list_of_words": ["hello"],
    "three_deep": [[conversation(["a"])]],
    "list_then_message": [conversation(["a"]), conversation(["a"])[0]],
    "message_then_list": [conversation(["a"])[0], conversation(["a"])],
    "no_role": [{"content": "a"}],
    "unknown_role": [{"role": "robot", "content": "a"}],
    "role_list": [{"role": ["user"], "content": "a"}],
    "no_content": [{"role": "user"}],
    "content_number": [{"role": "user", "content": 1}],
    "content_dict": [{"role": "user", "content": {"type": "text", "text": "a"}}],
    "part_words": [{"role": "user", "content": ["a"]}],
    "part_without_type": [{"role": "user", "content": [{"text": "a"}]}],
    "unknown_part": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
    "text_number": [{"role": "user", "content": [{"type": "text", "text": 1}]}],
    "text_missing": [{"role": "user", "content": [{"type": "text"}]}],
    "image_missing": [{"role": "user", "content": [{"type": "image"}]}],
    "image_none": [{"role": "user", "content": [{"type": "image", "image": None}]}],
    "image_list": [{"role": "user", "content": [{"type": "image", "image": [golden_image("square")] * 2}]}],
}

# The tensors whose shapes tell the configuration, and one that does not.
TELLING_TENSORS = (
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.0.self_attn.q_norm.weight",
    "language_model.model.layers.1.mlp.up_proj.weight",
    "vit_model.vision_model.embeddings.position_embedding.weight",
    "latent_pos_embed.pos_embed",
    "vit_pos_embed.pos_embed",
    "vae2llm.weight",
    "time_embedder.mlp.0.weight",
)
PLAIN_TENSOR = TELLING_TENSORS[2]


def label(value: Any) -> str:
    """A test id that is the same in every process."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return f"{tuple(value.shape)}-{value.dtype}"
    return type(value).__name__ if isinstance(value, (Image.Image, np.random.Generator)) else str(value)


def damage(file: Path, how: str, name: str) -> str:
    """Damage one tensor of a file, or the file; returns what a message must name."""
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return file.name
    weights = load_file(file)
    if how == "missing":
        del weights[name]
    elif how == "extra":
        name = "surplus.weight"
        weights[name] = torch.zeros(2)
    elif how == "misshapen":
        weights[name] = torch.zeros(weights[name].shape[0] + 1, *weights[name].shape[1:])
    elif how == "flattened":
        weights[name] = weights[name].flatten()
    save_file(weights, file, metadata={"format": "pt"})
    return ".".join(name.split(".")[-3:])


@pytest.fixture(params=["chat", "processor", "image_processor"])
def feed(request, processor):
    """One of the ways to give an image to the processor."""

    def chat(image):
        parts = [{"type": "image", "image": image}, {"type": "text", "text": "a"}]
        return processor.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=True, return_dict=True, return_tensors="pt"
        )

    ways = {
        "chat": chat,
        "processor": lambda image: processor(images=image, text=SEEN, return_tensors="pt"),
        "image_processor": processor.image_processor,
    }
    return ways[request.param]


@pytest.fixture
def idle(model, monkeypatch):
    """The model, whose towers must not run."""

    def late(*args, **kwargs):
        raise AssertionError("the bad input was not refused before the heavy work")

    monkeypatch.setattr(model.model.vision_tower, "forward", late)
    monkeypatch.setattr(model.model.language_model, "forward", late)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The layout that `save_pretrained` writes."""
    folder = tmp_path_factory.mktemp("saved")
    load_model().save_pretrained(folder)
    load_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_is_refused(kind, feed, tmp_path):
    with pytest.raises(REFUSED, match="`(images?|conversation)`"):
        feed(BAD_IMAGES[kind](tmp_path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [1000, 3000])
@pytest.mark.parametrize("kind", LARGE_IMAGES)
def test_image_over_the_pixel_limit_is_refused(kind, limit, feed, monkeypatch):
    image = LARGE_IMAGES[kind]()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match="`images?`.*limit"):
        feed(image)


@pytest.mark.parametrize("nesting", ["none", "list_with_none", "empty", "three_deep"])
def test_bad_image_list_is_refused(nesting, processor):
    images = {"none": None, "list_with_none": [None], "empty": [], "three_deep": [[[golden_image("square")]]]}[nesting]
    with pytest.raises(REFUSED, match="`?images`?"):
        processor(images=images, text=SEEN, return_tensors="pt")
    with pytest.raises(REFUSED, match="`images`"):
        processor.image_processor(images)


@pytest.mark.parametrize(
    ("text", "images"),
    [
        (SEEN + SEEN, 1),
        (SEEN, 2),
        (SEEN, 0),
        ("a", 1),
        (KEPT, 1),
        (KEPT + KEPT + SEEN, 1),
        ("<|image_pad|>", 1),
        ([SEEN, SEEN], [2, 0]),
        ([SEEN, SEEN], [1, 1, 0]),
        ([SEEN, "a"], [0, 1]),
        ([KEPT + SEEN + SEEN, KEPT], 2),
    ],
    ids=str,
)
def test_placeholders_must_match_images(text, images, processor):
    def several(count):
        return [golden_image("square") for _ in range(count)]

    images = [several(count) for count in images] if isinstance(images, list) else several(images) or None
    with pytest.raises(ValueError, match=r"images|<\|image_pad\|>"):
        processor(images=images, text=text, return_tensors="pt")


@pytest.mark.parametrize("text", [f"a {SEEN}", "a <|image_pad|>", "a <|vision_pad|>", KEPT + SEEN])
@pytest.mark.parametrize("mode", ["text", "image"])
def test_placeholder_in_a_message_is_refused(text, mode, encode):
    with pytest.raises(ValueError, match="images|_pad"):
        encode(["@square", text], generation_mode=mode)


@pytest.mark.parametrize("text", [1, [], [1], [["a"]], b"a", {"a": 1}, Image.new("RGB", (8, 8))], ids=label)
def test_bad_text_is_refused(text, processor):
    with pytest.raises(REFUSED, match="`text`"):
        processor(text=text, return_tensors="pt")


@pytest.mark.parametrize("kind", BAD_MESSAGES)
def test_bad_conversation_is_refused(kind, processor):
    with pytest.raises(REFUSED, match="`(conversation|images?)`"):
        processor.apply_chat_template(BAD_MESSAGES[kind], tokenize=True, return_dict=True, return_tensors="pt")


@pytest.mark.parametrize("part", [{"type": "a" * 5000}, {"type": "text", "text": ["a" * 5000]}, "a" * 5000])
def test_errors_show_the_beginning_of_what_they_were_given(part, processor):
    with pytest.raises(REFUSED, match="`conversation`") as raised:
        processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True)
    assert len(str(raised.value)) < 400


def test_text_that_is_no_unicode_is_refused(encode):
    with pytest.raises(ValueError, match="A text holds half a character"):
        encode(["\ud83d"])


@pytest.mark.parametrize("mode", ["video", "", None, ["text"]], ids=repr)
def test_unknown_generation_mode_is_refused(mode, encode):
    with pytest.raises(ValueError, match="`generation_mode`"):
        encode(["a"], generation_mode=mode)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("patch_size", 0),
        ("patch_size", -14),
        ("patch_size", "14"),
        ("vae_stride", 0),
        ("vae_stride", -16),
        ("max_pixels", 0),
        ("size", 5),
        ("size", {"height": 10}),
        ("size", {"shortest_edge": 10}),
        ("size", {"shortest_edge": -1, "longest_edge": 10}),
        ("vae_size", 5),
        ("vae_size", {}),
        ("vae_size", {"shortest_edge": -1, "longest_edge": 10}),
    ],
    ids=str,
)
def test_bad_image_setting_is_refused(name, value, processor):
    with pytest.raises(REFUSED, match=rf"\b{name}\b"):
        processor.image_processor(golden_image("square"), **{name: value})
    with pytest.raises(REFUSED, match=rf"\b{name}\b"):
        BagelImageProcessor(**{name: value})
    with pytest.raises(REFUSED, match=rf"\b{name}\b"):
        BagelProcessor.from_pretrained(CHECKPOINT, **{name: value})


def test_a_broken_file_is_named(tmp_path):
    path = written(tmp_path, PNG[: len(PNG) // 2], "half.png")
    for source in (path, Image.open(path)):
        with pytest.raises(OSError, match=r"`images`.*half\.png"):
            to_rgb(source)


def test_processor_is_unchanged_by_bad_input(processor, encode):
    good = ["@wide", "what?"]
    before = encode(good)
    for bad in ([], [{"role": "robot", "content": "a"}], conversation([SEEN]), conversation(["@wide", SEEN])):
        with pytest.raises(REFUSED):
            processor.apply_chat_template(bad, tokenize=True, return_dict=True, return_tensors="pt")
    after = encode(good)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize("given", [0, 1, 3])
def test_model_refuses_images_without_placeholders_and_the_reverse(given, method, idle, processor):
    inputs = processor(text=SEEN + SEEN, images=[golden_image("square")] * 2, return_tensors="pt")
    images = processor.image_processor([golden_image("square")] * max(given, 1), return_tensors="pt")
    for name in ("pixel_values", "image_grid_hw"):
        inputs[name] = images[name]
        if not given:
            del inputs[name]
    with pytest.raises(ValueError, match="`pixel_values`"):
        idle(**inputs) if method == "forward" else idle.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_model_refuses_images_without_their_grids(method, idle, processor):
    inputs = processor(text=SEEN, images=golden_image("square"), return_tensors="pt")
    del inputs["image_grid_hw"]
    with pytest.raises(REFUSED, match="image_grid_hw"):
        idle(**inputs) if method == "forward" else idle.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("extra", ["nothing", "attention_mask", "mm_token_type_ids"])
@pytest.mark.parametrize("method", ["forward", "generate"])
def test_context_longer_than_the_position_range_is_refused(method, extra, idle):
    limit = idle.config.text_config.max_position_embeddings
    inputs = {"input_ids": torch.full((1, limit + 1), 70)}
    if extra == "attention_mask":
        inputs[extra] = torch.ones_like(inputs["input_ids"])
    elif extra == "mm_token_type_ids":
        inputs[extra] = torch.zeros_like(inputs["input_ids"])
    with pytest.raises(ValueError, match="max_position_embeddings"):
        idle(**inputs) if method == "forward" else idle.generate(**inputs, max_new_tokens=1)


def test_embeddings_longer_than_the_position_range_are_refused(idle):
    config = idle.config.text_config
    with pytest.raises(ValueError, match="max_position_embeddings"):
        idle(inputs_embeds=torch.zeros(1, config.max_position_embeddings + 1, config.hidden_size))


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("latents", torch.zeros(4, 15), "`latents`"),
        ("latents", torch.zeros(5, 16), "`latents`"),
        ("latents", torch.zeros(1, 4, 16), "`latents`"),
        ("latents", np.zeros((4, 16)), "`latents`"),
        ("latent_grid_hw", torch.tensor([[9, 1]]), "`latent_grid_hw`"),
        ("latent_grid_hw", torch.tensor([[-2, -2]]), "`latent_grid_hw`"),
        ("latent_grid_hw", torch.tensor([2, 2]), "`latent_grid_hw`"),
        ("latent_grid_hw", None, "`latent_grid_hw`"),
        ("timesteps", torch.ones(2), "`timesteps`"),
        ("timesteps", None, "`timesteps`"),
        ("position_ids", None, "`position_ids`"),
        ("position_ids", torch.zeros(2, dtype=torch.long), "`position_ids`"),
        ("position_ids", torch.tensor([5000]), "max_position_embeddings"),
    ],
    ids=label,
)
def test_bad_denoising_step_is_refused(name, value, match, idle):
    step = {
        "latents": torch.zeros(4, 16),
        "latent_grid_hw": torch.tensor([[2, 2]]),
        "timesteps": torch.ones(1),
        "position_ids": torch.zeros(1, dtype=torch.long),
    }
    with pytest.raises(REFUSED, match=match):
        idle(**(step | {name: value}))


@pytest.mark.parametrize("loader", [BagelForConditionalGeneration, AutoModelForImageTextToText])
@pytest.mark.parametrize("how", ["missing", "extra", "misshapen", "flattened", "truncated"])
@pytest.mark.parametrize("layout", ["original", "saved"])
def test_damaged_checkpoint_is_refused(layout, how, loader, saved, tmp_path):
    source, name = {"original": (CHECKPOINT, "ema.safetensors"), "saved": (saved, "model.safetensors")}[layout]
    folder = tmp_path / "checkpoint"
    shutil.copytree(source, folder)
    named = damage(folder / name, how, PLAIN_TENSOR)
    with pytest.raises(OSError if how == "truncated" else ValueError, match=re.escape(named)):
        loader.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in TELLING_TENSORS
        for how in ("missing", "misshapen", "flattened")
        # A norm's weight is flat already.
        if name != PLAIN_TENSOR and not (how == "flattened" and "norm" in name)
        # A position table is computed if it is missing.
        if not (how == "missing" and "pos_embed" in name)
    ],
)
def test_damaged_tensor_that_tells_the_configuration_is_refused(name, how, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    damage(folder / "ema.safetensors", how, name)
    with pytest.raises(REFUSED, match=re.escape(str(folder))):
        BagelForConditionalGeneration.from_pretrained(folder)


def test_truncated_shard_is_refused(tmp_path):
    load_model().save_pretrained(tmp_path, max_shard_size="400KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(OSError, match=shard.name):
        BagelForConditionalGeneration.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        BagelForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "loader", [BagelForConditionalGeneration, AutoModelForImageTextToText, BagelProcessor, AutoProcessor]
)
@pytest.mark.parametrize("content", ["absent", "empty", "readme", "file"])
def test_folder_without_checkpoint_is_refused(content, loader, tmp_path, offline):
    folder = tmp_path / content
    if content == "file":
        folder.write_text("no checkpoint", encoding="utf-8")
    elif content != "absent":
        folder.mkdir()
    if content == "readme":
        (folder / "README.md").write_text("no checkpoint", encoding="utf-8")
    with pytest.raises(REFUSED, match=re.escape(str(folder))):
        loader.from_pretrained(folder)


@pytest.mark.parametrize("loader", [BagelForConditionalGeneration, AutoModelForImageTextToText])
def test_configuration_without_weights_is_refused(loader, saved, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        loader.from_pretrained(tmp_path)


@pytest.mark.parametrize("layout", ["original", "saved"])
def test_processor_without_tokenizer_is_refused(layout, saved, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT if layout == "original" else saved, folder)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(REFUSED, match=re.escape(str(folder))):
        BagelProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    "loader", [BagelForConditionalGeneration, AutoModelForImageTextToText, BagelProcessor, AutoProcessor]
)
def test_unknown_repository_is_refused(loader, offline):
    with pytest.raises(OSError):
        loader.from_pretrained("nobody/no-such-bagel")
