"""Files of a checkpoint that cannot be right are refused by name, before a model is made of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.conftest import CHECKPOINT, load_model, load_processor
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.checkpoints import is_finite


HEAD = "language_model.lm_head.weight"
LOADERS = {
    "config": BagelConfig.from_pretrained,
    "auto_config": AutoConfig.from_pretrained,
    "model": BagelForConditionalGeneration.from_pretrained,
    "auto_model": AutoModelForImageTextToText.from_pretrained,
    "processor": BagelProcessor.from_pretrained,
}
# Loaders that have no other way to the settings than the library's.
OURS = ("config", "model", "processor")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The layout that `save_pretrained` writes, in two files of weights."""
    folder = tmp_path_factory.mktemp("saved")
    load_model().save_pretrained(folder, max_shard_size="800KB")
    load_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def spoilt(saved, tmp_path) -> Callable[..., Path]:
    """`spoilt(layout, file, change)`: a copy of a checkpoint with the JSON of a file as `change(content)` leaves it."""

    def make(layout: str, file: str = "config.json", change: Callable[[dict], Any] = lambda content: None) -> Path:
        folder = tmp_path / layout
        shutil.copytree({"original": CHECKPOINT, "saved": saved}[layout], folder)
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        change(content)
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make


def setting(*keys: str, value: Any) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.fixture
def unbuilt(monkeypatch):
    """No model may be made, not even an empty one."""
    monkeypatch.setattr(BagelForConditionalGeneration, "__init__", lambda *args, **kwargs: pytest.fail("built"))


@pytest.mark.parametrize("layout", ["original", "saved"])
@pytest.mark.parametrize("word", ["bagel_mot", "qwen2"])
@pytest.mark.parametrize("loader", OURS)
def test_another_model_type_is_refused_with_file_and_key(layout, word, loader, spoilt):
    folder = spoilt(layout, change=setting("model_type", value=word))
    with pytest.raises(ValueError, match=rf"`model_type` in .*{layout}.* is '{word}'"):
        LOADERS[loader](folder)


@pytest.mark.parametrize("loader", ["auto_config", "auto_model"])
def test_auto_classes_know_no_misspelt_model_type_either(loader, spoilt):
    with pytest.raises(ValueError, match="bagel_mot"):
        LOADERS[loader](spoilt("original", change=setting("model_type", value="bagel_mot")))


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("loader", ["config", "auto_config", "model"])
def test_a_part_of_another_type_is_refused(part, loader, spoilt):
    folder = spoilt("saved", change=setting(part, "model_type", value="llama"))
    with pytest.raises(ValueError, match=rf"config\.json.*`{part}`.*`model_type` is 'llama'"):
        LOADERS[loader](folder)


@pytest.mark.parametrize(
    ("loaded", "part", "key", "wrong_key", "message"),
    [
        ({}, "text_config", "hidden_size", "hidden_sise", "wrong shape"),
        ({"visual_gen": False}, None, "visual_gen", "visual_generation", "lacks"),
    ],
)
def test_a_misspelt_key_never_gives_weights_that_no_file_has(loaded, part, key, wrong_key, message, tmp_path):
    load_model(**loaded).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    place = content if part is None else content[part]
    place[wrong_key] = place.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    for loader in ("model", "auto_model"):
        with pytest.raises(ValueError, match=message):
            LOADERS[loader](tmp_path)


# Place in the configuration, what it says, and what the error names.
SIZES = [
    (("text_config", "num_hidden_layers"), 10**6, "num_hidden_layers"),
    (("vision_config", "num_hidden_layers"), 10**6, "num_hidden_layers"),
    (("vision_config", "num_hidden_layers"), 900, r"`vision_config.num_hidden_layers` .* 900, and its files have 2"),
    (("text_config", "hidden_size"), 10**9, "hidden_size"),
    (("text_config", "num_key_value_heads"), 0, "num_key_value_heads"),
    (("vision_config", "patch_size"), 0, "patch_size"),
    (("max_latent_size",), 10**6, "max_latent_size"),
    (("latent_patch_size",), -1, "latent_patch_size"),
]


@pytest.mark.parametrize(("place", "value", "message"), SIZES, ids=lambda value: str(value).replace(" ", ""))
def test_absurd_sizes_are_refused_before_a_model_is_made(place, value, message, spoilt, unbuilt):
    folder = spoilt("saved", change=setting(*place, value=value))
    for loader in ("model", "auto_model"):
        with pytest.raises(ValueError, match=message):
            LOADERS[loader](folder)


@pytest.mark.parametrize("loader", ["model", "auto_model"])
def test_layers_that_no_file_has_are_counted_and_not_built(loader, spoilt, unbuilt):
    layers = {"num_hidden_layers": 900, "layer_types": None}
    folder = spoilt("saved", change=lambda content: content["text_config"].update(layers))
    with pytest.raises(ValueError, match=r"`text_config.num_hidden_layers` .* 900, and its files have 3"):
        LOADERS[loader](folder)


def test_absurd_sizes_of_the_original_layout_are_refused_too(spoilt, unbuilt):
    folder = spoilt("original", change=setting("llm_config", "intermediate_size", value=10**12))
    with pytest.raises(ValueError, match="`intermediate_size`"):
        BagelForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_configuration_by_hand_is_bounded_too(part):
    with pytest.raises(Exception, match="`num_hidden_layers` must be between 1 and 1024, got 1000000000"):
        BagelConfig(**{part: {"num_hidden_layers": 10**9}})


VALUES = [
    ("original", ("llm_config", "hidden_size"), "x"),
    ("original", ("vit_config", "patch_size"), "x"),
    ("original", ("llm_config", "rope_theta"), "x"),
    ("original", ("llm_config", "rope_parameters"), {"rope_type": "spiral"}),
    ("original", ("llm_config",), 5),
    ("original", ("vit_config",), []),
    ("original", ("latent_patch_size",), "x"),
    ("saved", ("text_config", "hidden_size"), "x"),
    ("saved", ("text_config", "hidden_act"), "nonsense"),
    ("saved", ("text_config", "use_cache"), 0),
    ("saved", ("text_config",), "x"),
    ("saved", ("vision_config", "image_size"), 1.5),
    ("saved", ("visual_gen",), "no"),
    ("saved", ("dtype",), "int32"),
    ("saved", ("dtype",), 5),
    ("saved", ("connector_act",), None),
    ("saved", ("transformers_weights",), 5),
    ("saved", ("quantization_config",), 5),
]


@pytest.mark.parametrize(("layout", "place", "value"), VALUES, ids=str)
def test_values_of_the_wrong_kind_are_named_with_their_file(layout, place, value, spoilt):
    folder = spoilt(layout, change=setting(*place, value=value))
    named = "to_dict" if place == ("quantization_config",) else place[-1]
    for loader in ("config", "model", "auto_model"):
        with pytest.raises(ValueError, match=rf"config\.json(.|\n)*{named}|{named}.* in .*config\.json"):
            LOADERS[loader](folder)


BROKEN = ["", "{", "[]", "3", "null", '{"a": NaN}', '{"a":' * 100_000, b"\xff\xfe"]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: repr(content)[:12])
@pytest.mark.parametrize(
    ("layout", "file", "loader"),
    [
        ("original", "config.json", "config"),
        ("original", "config.json", "processor"),
        ("saved", "config.json", "model"),
        ("saved", "tokenizer.json", "processor"),
        ("original", "tokenizer.json", "model"),
        ("original", "tokenizer_config.json", "config"),
        ("saved", "processor_config.json", "processor"),
        ("saved", "model.safetensors.index.json", "model"),
    ],
)
def test_broken_json_is_named(content, layout, file, loader, spoilt):
    folder = spoilt(layout)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{file}' (cannot be read|must hold)"):
        LOADERS[loader](folder)


SMALL_FILES = [
    ("saved", "tokenizer.json", {}, "processor", "The tokenizer in"),
    ("saved", "tokenizer.json", {"model": 5}, "processor", "The tokenizer in"),
    ("original", "tokenizer.json", {"added_tokens": 5}, "model", r"`added_tokens` in .*tokenizer\.json"),
    ("original", "tokenizer.json", {"added_tokens": [5]}, "config", r"added tokens in .*tokenizer\.json"),
    ("original", "tokenizer_config.json", {"added_tokens_decoder": []}, "config", "`added_tokens_decoder` in"),
    ("saved", "processor_config.json", {"image_processor": {"patch_size": "x"}}, "processor", "`patch_size`"),
    ("saved", "processor_config.json", {"image_processor": {"size": 5}}, "processor", "images.* in"),
    ("saved", "processor_config.json", {"image_processor": 5}, "processor", "saved"),
    ("saved", "processor_config.json", {"images": {}}, "processor", "`image_processor` is missing in"),
    ("original", "tokenizer_config.json", {"model_max_length": [[]]}, "processor", "`model_max_length` in"),
    ("original", "config.json", {"model_type": ["x"]}, "processor", "`model_type` in"),
    ("saved", "generation_config.json", {"temperature": "x"}, "model", r"generation_config\.json"),
    ("saved", "generation_config.json", {"max_new_tokens": -5}, "model", r"generation_config\.json"),
    ("saved", "model.safetensors.index.json", {"weight_map": []}, "model", "`weight_map` in"),
    ("saved", "model.safetensors.index.json", {"weight_map": {"a": 1}}, "model", "`weight_map` in"),
    ("saved", "model.safetensors.index.json", {"weight_map": {"a": "../a.safetensors"}}, "model", "`weight_map` in"),
]


@pytest.mark.parametrize(("layout", "file", "content", "loader", "message"), SMALL_FILES, ids=str)
def test_small_files_of_the_wrong_kind_are_named(layout, file, content, loader, message, spoilt):
    folder = spoilt(layout)
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        LOADERS[loader](folder)


def test_an_index_of_files_that_are_not_there_is_named(spoilt):
    folder = spoilt("original")
    index = {"metadata": {}, "weight_map": {HEAD: "elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "ema.safetensors").unlink()
    with pytest.raises(OSError, match=r"index\.json' names the file 'elsewhere\.safetensors', which is not there"):
        LOADERS["model"](folder)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "ema.safetensors", "special_tokens_map.json"])
def test_what_is_no_file_is_refused_and_not_waited_for(kind, file, spoilt):
    folder = spoilt("original")
    (folder / file).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / file)
    else:
        (folder / file).symlink_to("/dev/zero")
    for loader in OURS:
        with pytest.raises(OSError, match=rf"{file}' is a pipe or a device"):
            LOADERS[loader](folder)


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", [HEAD, "vit_model.vision_model.encoder.layers.0.layer_norm1.bias", "latent_pos_embed.pos_embed"]
)
def test_integers_are_no_weights(name, spoilt):
    folder = spoilt("original")
    rewrite(folder / "ema.safetensors", lambda weights: weights.update({name: weights[name].to(torch.int32)}))
    with pytest.raises(ValueError, match=rf"int32.* in {name}"):
        BagelForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("loader", ["model", "auto_model"])
def test_a_tensor_in_two_files_is_refused(loader, spoilt):
    folder = spoilt("saved")
    first, *_, last = sorted(folder.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    rewrite(last, lambda weights: weights.update({name: tensor + 1}))
    with pytest.raises(ValueError, match=rf"'{name}' is in .*{first.name}.*{last.name}"):
        LOADERS[loader](folder)


def fill(name: str, value: float, rows: slice = slice(None)) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights[name][rows].fill_(value)


NOT_FINITE = {
    "head": fill(HEAD, torch.nan),
    "row_of_the_head": fill(HEAD, torch.nan, slice(101, 102)),
    "norm": fill("language_model.model.norm.weight", torch.inf, slice(3, 4)),
    "bias": fill("language_model.model.layers.1.self_attn.q_proj.bias", -torch.inf, slice(0, 1)),
    "matrix": fill("language_model.model.layers.1.mlp.up_proj.weight", torch.nan),
    "half_of_a_matrix": fill("vit_model.vision_model.encoder.layers.1.mlp.fc1.weight", torch.nan, slice(40, None)),
}


@pytest.mark.parametrize("where", NOT_FINITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_numbers_that_are_not_finite_are_found(where, dtype, spoilt):
    folder = spoilt("original")

    def change(weights: dict[str, torch.Tensor]) -> None:
        NOT_FINITE[where](weights)
        weights.update({name: tensor.to(dtype) for name, tensor in weights.items()})

    rewrite(folder / "ema.safetensors", change)
    with pytest.raises(ValueError, match="not finite in .*(lm_head|norm|q_proj.bias|up_proj|fc1)"):
        BagelForConditionalGeneration.from_pretrained(folder)


def test_values_that_are_left_in_the_files_are_not_looked_at(spoilt):
    folder = spoilt("original")
    rewrite(folder / "ema.safetensors", fill("llm2vae.weight", torch.nan))
    with pytest.raises(ValueError, match=r"llm2vae\.weight"):
        BagelForConditionalGeneration.from_pretrained(folder)
    assert BagelForConditionalGeneration.from_pretrained(folder, visual_gen=False).config.visual_gen is False


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("image_token_id",), 448, "`image_token_id` .* is 448, and the vocabulary ends at 447"),
        (("text_config", "eos_token_id"), 10**7, "`text_config.eos_token_id`"),
        (("text_config", "eos_token_id"), [422, -3], "`text_config.eos_token_id` .* is -3"),
        (("latent_token_id",), 429, "`(latent|vision_start)_token_id` and `.*` .* are both 429"),
        (("vision_start_token_id",), 0, r"`vision_start_token_id` .* is 0, and <\|vision_start\|> is 429"),
    ],
)
def test_ids_of_special_tokens_that_cannot_be_right_are_refused(place, value, message, spoilt):
    folder = spoilt("saved", change=setting(*place, value=value))
    for loader in ("model", "auto_model"):
        with pytest.raises(ValueError, match=message):
            LOADERS[loader](folder)


def test_the_processor_compares_its_ids_with_the_settings_beside_it(spoilt):
    folder = spoilt("saved", change=setting("vision_end_token_id", value=0))
    with pytest.raises(ValueError, match=r"`vision_end_token_id` in '.*config\.json' is 0"):
        BagelProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_a_number_that_is_not_finite_is_found_among_many(dtype):
    numbers = torch.full((300, 500), 400.0).to(dtype)
    assert is_finite(numbers)
    numbers[7, 9] = torch.nan
    assert not is_finite(numbers)


def test_infinities_and_nothing():
    assert not is_finite(torch.tensor([torch.inf, -torch.inf, 0.0])) and is_finite(torch.zeros(0, 4))
