"""Samples become packed rows: what is learned, what conditions, where everything stands."""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import logging
import pickle
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from diffusers_bagel import BagelPipeline
from tests.conftest import (
    CASES,
    CHECKPOINT,
    GOLDEN,
    PickyVae,
    golden_image,
    load_model,
    max_error,
    training_samples,
    turn,
)
from transformers_bagel import BagelDataCollator
from transformers_bagel.image_processing_bagel import patchify, unpatchify
from transformers_bagel.latents import decode_latents, encode_posterior
from transformers_bagel.sequence import IMAGE_TOKEN, LATENT_TOKEN
from transformers_bagel.training.collator import EncodedSample, fill_rows
from transformers_bagel.training.latents import LatentEncoder
from transformers_bagel.training.losses import next_labels


CASE = CASES["train"][0]
KEY = CASE["key"]
STARTS = {CASES["token_ids"][name] for name in ("bos_token_id", "start_of_image")}
PNG = (GOLDEN / "inputs" / "wide.png").read_bytes()


def golden_samples() -> list[dict]:
    def part(item: dict) -> dict:
        return {**item, "image": golden_image(item["image"])} if "image" in item else item

    return [{"segments": [part(item) for item in sample]} for sample in CASE["samples"]]


def golden_messages() -> list[dict]:
    """The same samples as conversations."""
    square, wide, tall = (golden_image(name) for name in ("square", "wide", "tall"))
    texts = [item["text"] for sample in CASE["samples"] for item in sample if item["type"] == "text"]

    def turn(role: str, *parts) -> dict:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in parts
        ]
        return {"role": role, "content": content}

    return [
        {"messages": [turn("user", texts[0]), turn("assistant", square)]},
        {"messages": [turn("user", wide, texts[1]), turn("assistant", texts[2])]},
        {"messages": [turn("user", tall, texts[3]), turn("assistant", tall)]},
    ]


@pytest.mark.parametrize("samples", [golden_samples, golden_messages])
def test_golden_row(samples, collate, model, golden):
    given = {name.removeprefix(f"{KEY}.in."): value for name, value in golden.items() if f"{KEY}.in." in name}
    batch = collate()(samples())
    ids = batch["input_ids"][0]
    assert ids[given["packed_text_indexes"]].tolist() == given["packed_text_ids"].tolist()
    assert (ids == model.config.latent_token_id).nonzero().flatten().tolist() == given[
        "packed_vae_token_indexes"
    ].tolist()
    assert (ids == model.config.image_token_id).nonzero().flatten().tolist() == given[
        "packed_vit_token_indexes"
    ].tolist()
    assert batch["position_ids"][0].tolist() == given["packed_position_ids"].tolist()
    assert batch["document_ids"][0].bincount().tolist() == CASE["sample_lens"]
    assert batch["latent_grid_hw"].tolist() == CASE["latent_shapes"]
    learned = (batch["labels"][0] != -100).nonzero().flatten() - 1
    assert learned.tolist() == given["ce_loss_indexes"].tolist()
    assert max_error(batch["pixel_values"], given["packed_vit_tokens"]) <= 1e-6

    ends = batch["latent_grid_hw"].prod(-1).cumsum(0)
    levels = given["packed_timesteps"].sigmoid()[ends - 1]
    assert ((batch["timesteps"] > 0) == (levels > 0)).all()
    batch["timesteps"], batch["noise"] = levels, golden[f"{KEY}.noise"]
    out = model(**batch)
    assert abs(out.ce_loss.item() - golden[f"{KEY}.ce"].mean().item()) <= 1e-4
    assert abs(out.mse_loss.item() - golden[f"{KEY}.mse"].mean().item()) <= 1e-4
    assert abs(out.loss.item() - CASE["loss"]) <= 1e-4


def blocks(encoded: EncodedSample) -> list[tuple[str, int, int]]:
    """Runs of a sample, `(kind, position, count)`; a text has one position a token, an image one altogether."""
    ids, types, positions = encoded.input_ids.tolist(), encoded.token_types.tolist(), encoded.position_ids.tolist()
    starts, runs = [i for i, token in enumerate(ids) if token in STARTS], []
    for start, stop in itertools.pairwise([*starts, len(ids)]):
        kind = {0: "text", IMAGE_TOKEN: "vit", LATENT_TOKEN: "vae"}[types[start + 1]]
        places = positions[start:stop]
        expected = range(places[0], places[0] + len(places)) if kind == "text" else [places[0]] * len(places)
        assert places == list(expected)
        runs.append((kind, places[0], len(places)))
    return runs


def words(collator: BagelDataCollator, text: str) -> int:
    return len(collator.processor.tokenizer(f"<|im_start|>{text}<|im_end|>")["input_ids"])


def looking_at(image, **kwargs) -> dict:
    image = {"type": "image", "image": image}
    return {"messages": [turn("user", image, "what?"), turn("assistant", "a thing")], **kwargs}


def drawing(image, prompt: str = "a", **kwargs) -> dict:
    image = {"type": "image", "image": image}
    return {"messages": [turn("user", prompt), turn("assistant", image)], **kwargs}


# ---- The row


def test_labels_are_the_learned_texts_with_their_end(collate):
    collator = collate(next_action="none")
    batch = collator(training_samples("talk", "chat", "look"))
    decode = collator.processor.tokenizer.decode
    targets = next_labels(batch["labels"], batch["document_ids"])[0]
    learned = [
        decode([token for token in targets[batch["document_ids"][0] == sample].tolist() if token != -100])
        for sample in range(3)
    ]
    assert learned == [
        "hi there<|im_end|>",
        "here<|im_end|>a wide circle<|im_end|>",
        "three shapes, I think<|im_end|>",
    ]
    # The start token predicts the first word, and a label is never another token than its own.
    labels, ids = batch["labels"][0], batch["input_ids"][0]
    starts = ids == collator.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert (labels[starts] == -100).all()
    assert (labels[labels != -100] == ids[labels != -100]).all()
    assert (targets[starts] != -100).sum() == 4


def test_a_label_is_never_predicted_from_another_sample():
    labels = torch.tensor([[7, 8, 9, 10, 11]])
    documents = torch.tensor([[0, 0, 1, 0, 0]])
    assert next_labels(labels, documents).tolist() == [[8, -100, -100, 11, -100]]
    assert next_labels(labels).tolist() == [[8, 9, 10, 11, -100]]


def test_positions_of_a_conversation_that_goes_on(collate):
    collator = collate()
    encoded = collator.encode(training_samples("chat")[0], seed=0)
    square, wide = (18, 27), (42, 56)
    expected, position = [], 0
    for text, image in (("a red circle", None), ("here", square), ("make it wide", wide), ("what is it?", None)):
        count = words(collator, text)
        expected.append(("text", position, count))
        position += count
        if image:
            # Noised and clean latents at one position, the ViT tokens at the next.
            expected += [("vae", position, image[0]), ("vae", position, image[0]), ("vit", position + 1, image[1])]
            position += 2
    expected.append(("text", position, words(collator, "a wide circle")))
    assert blocks(encoded) == expected
    assert [block.timestep > 0 for block in encoded.blocks] == [True, False, True, False]


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({}, [("vae", 0), ("vit", 1), ("text", 2), ("vae", 2 + 6)]),
        ({"text_dropout": 1.0}, [("vae", 0), ("vit", 1), ("vae", 2)]),
        ({"vit_dropout": 1.0}, [("vae", 0), ("text", 2), ("vae", 2 + 6)]),
        ({"vae_dropout": 1.0}, [("vit", 1), ("text", 2), ("vae", 2 + 6)]),
        ({"vit_dropout": 1.0, "vae_dropout": 1.0}, [("text", 2), ("vae", 2 + 6)]),
        ({"text_dropout": 1.0, "vit_dropout": 1.0, "vae_dropout": 1.0}, [("vae", 2)]),
    ],
)
def test_a_dropped_image_leaves_its_position_and_a_dropped_text_none(rates, expected, collate):
    collator = collate(**rates)
    assert words(collator, "make it green") == 6
    encoded = collator.encode(training_samples("edit")[0], seed=0)
    assert [block[:2] for block in blocks(encoded)] == expected
    # What is dropped brings no pixels either; the drawing needs the one image that is left.
    assert len(encoded.patches) == sum(kind == "vit" for kind, _ in expected)
    assert len(encoded.latent_images) == len(encoded.blocks) == sum(kind == "vae" for kind, _ in expected)


@pytest.mark.parametrize(
    ("rates", "after"),
    [
        # Distances from the drawing that is given back: copy, ViT tokens, next text.
        ({}, [("vae", 0), ("vit", 1), ("text", 2)]),
        ({"vae_dropout": 1.0}, [("vit", 1), ("text", 2)]),
        ({"vit_dropout": 1.0}, [("vae", 0), ("text", 2)]),
        ({"vit_dropout": 1.0, "vae_dropout": 1.0}, [("text", 2)]),
    ],
)
def test_a_dropped_copy_of_a_drawing_leaves_its_position(rates, after, collate):
    (sample,) = training_samples("chat")
    sample = {"messages": sample["messages"][:4]}
    runs = [run[:2] for run in blocks(collate(**rates).encode(sample, seed=0))]
    first = next(index for index, (kind, _) in enumerate(runs) if kind == "vae")
    start = runs[first][1]
    assert [(kind, position - start) for kind, position in runs[first + 1 : first + 1 + len(after)]] == after


def test_nothing_is_dropped_from_an_understanding_sample(collate):
    collator = collate(text_dropout=1.0, vit_dropout=1.0, vae_dropout=1.0)
    kinds = [kind for kind, _, _ in blocks(collator.encode(training_samples("look")[0], seed=0))]
    assert kinds == ["vit", "text", "text"]


def test_conditions_are_dropped_one_by_one_at_their_rates(collate):
    collator = collate(text_dropout=0.1, vit_dropout=0.3, vae_dropout=0.6)
    square = golden_image("square")
    parts = [
        {"type": "text", "text": ""},
        {"type": "vit_image", "image": square},
        {"type": "vae_image", "image": square},
    ]
    sample = {"segments": [*parts * 30, {"type": "vae_image", "image": square, "loss": True}]}
    kept: dict[str, list[int]] = {"text": [], "vit": [], "vae": []}
    for seed in range(30):
        kinds = [kind for kind, _, _ in blocks(collator.encode(sample, seed))]
        for kind, counts in kept.items():
            counts.append(kinds.count(kind) - (kind == "vae"))
    for kind, rate in (("text", 0.1), ("vit", 0.3), ("vae", 0.6)):
        # 900 draws: four standard deviations. One draw for a whole sample would leave all or none.
        assert abs(1 - sum(kept[kind]) / 900 - rate) <= 4 * (rate * (1 - rate) / 900) ** 0.5
        assert min(kept[kind]) > 0


def test_rows_keep_to_the_budget_and_everything_keeps_its_order(collate):
    collator = collate()
    edit, chat, look, draw = training_samples("edit", "chat", "look", "draw")
    chat = {"messages": chat["messages"][:4]}
    samples = [collator.encode(sample, seed) for seed, sample in enumerate((edit, chat, look, draw))]
    lengths = [len(sample) for sample in samples]
    collator.max_tokens = budget = lengths[0] + lengths[2] + lengths[3]
    # The last two go back into the first row, past the second sample: images of all kinds must follow.
    rows = fill_rows(lengths, budget)
    assert rows == [[0, 2, 3], [1]]
    order = [0, 2, 3, 1]
    batch = collator.pack(samples)
    assert batch["input_ids"].shape == (len(rows), max(sum(lengths[index] for index in row) for row in rows))
    assert batch["input_ids"].shape[1] <= budget
    assert torch.equal(batch["pixel_values"], torch.cat([p for i in order for p in samples[i].patches]))
    assert torch.equal(batch["noise"], torch.cat([b.noise for i in order for b in samples[i].blocks]))
    assert batch["timesteps"].tolist() == [b.timestep.item() for i in order for b in samples[i].blocks]
    for number, index in enumerate(order):
        own = batch["document_ids"] == number
        assert own.any(-1).sum() == 1
        for name, field in (("input_ids", "input_ids"), ("labels", "labels"), ("position_ids", "position_ids")):
            assert torch.equal(batch[name][own], getattr(samples[index], field))
    padding = batch["document_ids"] < 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert (batch["mm_token_type_ids"][padding] == 0).all()
    assert (batch["input_ids"][padding] == collator.processor.tokenizer.pad_token_id).all()


@pytest.mark.parametrize(
    ("lengths", "budget", "rows"),
    [
        ([5, 5, 5], None, [[0, 1, 2]]),
        ([5, 5, 5], 10, [[0, 1], [2]]),
        ([6, 6, 4, 4], 10, [[0, 2], [1, 3]]),
        ([10, 10], 10, [[0], [1]]),
        ([], 10, []),
    ],
)
def test_a_sample_goes_into_the_first_row_with_room(lengths, budget, rows):
    assert fill_rows(lengths, budget) == rows


def test_a_batch_holds_only_what_its_samples_need(collate):
    always = {"input_ids", "labels", "mm_token_type_ids", "position_ids", "document_ids"}
    vit, vae = {"pixel_values", "image_grid_hw"}, {"latents", "noise", "latent_grid_hw", "timesteps"}
    assert set(collate(vae=None)(training_samples("talk"))) == always
    assert set(collate(vae=None)(training_samples("look", "talk"))) == always | vit
    assert set(collate()(training_samples("draw"))) == always | vae
    assert set(collate()(training_samples("talk", "edit"))) == always | vit | vae


# ---- Images and latents


def test_images_are_encoded_one_by_one_and_once(collate, vae):
    shapes = []
    hook = vae.encoder.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    batch = collate()(training_samples("chat", "edit", "look"))
    hook.remove()
    square, wide, tall = (1, 3, 64, 64), (1, 3, 80, 128), (1, 3, 112, 64)
    # Drawn and given back, or not: one call an image, at its own size; none for an image that is only seen.
    assert shapes == [square, wide, tall, wide]
    assert batch["latent_grid_hw"].tolist() == [[4, 4], [4, 4], [5, 8], [5, 8], [7, 4], [5, 8]]


def test_latents_are_the_posteriors_mean_packed(collate, vae):
    batch = collate()([drawing(golden_image("wide"))])
    pixels = collate().processor.image_processor(golden_image("wide"), return_vae_pixel_values=True)[
        "vae_pixel_values"
    ]
    with torch.no_grad():
        mean = vae.encode(torch.as_tensor(pixels[0])[None]).latent_dist.mean[0]
    mean = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    rows, columns = batch["latent_grid_hw"][0].tolist()
    for index, token in enumerate(batch["latents"]):
        row, column = divmod(index, columns)
        cells = mean[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.allclose(token, cells.permute(1, 2, 0).flatten(), atol=1e-6)
    assert len(batch["latents"]) == rows * columns


def test_a_drawing_and_its_clean_copy_are_one_sample_of_the_posterior(collate):
    collator = collate(vae_sample_mode="sample")
    (sample,) = training_samples("chat")
    encoded = collator.encode({"messages": sample["messages"][:3]}, seed=0)
    batch = collator.pack([encoded])
    drawn, copy = batch["latents"].split(16)
    assert torch.equal(drawn, copy)
    mean = collate().pack([collate().encode({"messages": sample["messages"][:3]}, seed=0)])["latents"].split(16)[0]
    assert max_error(drawn, mean) > 1e-3
    other = collator.pack([collator.encode({"messages": sample["messages"][:3]}, seed=1)])["latents"].split(16)[0]
    assert max_error(drawn, other) > 1e-3


def test_the_posterior_is_sampled_with_its_own_deviation(collate, vae):
    collator = collate(vae_sample_mode="sample")
    sample = drawing(golden_image("square"))
    drawn = torch.stack([collator.pack([collator.encode(sample, seed)])["latents"] for seed in range(64)])
    pixels = collator.encode(sample, 0).latent_images[0].pixels
    with torch.no_grad():
        deviation = vae.encode(pixels[None]).latent_dist.std.mean() * vae.config.scaling_factor
    assert abs(drawn.std(0).mean() / deviation - 1) <= 0.05


def test_noise_is_of_drawings_only_and_differs_between_them(collate):
    batch = collate()(training_samples("chat", "edit"))
    noised = batch["timesteps"] > 0
    assert noised.tolist() == [True, False, True, False, False, True]
    parts = batch["noise"].split(batch["latent_grid_hw"].prod(-1).tolist())
    for part, is_drawn in zip(parts, noised.tolist(), strict=True):
        assert (part.abs().sum() > 0) == is_drawn
    drawn = torch.cat([part for part, is_drawn in zip(parts, noised.tolist(), strict=True) if is_drawn])
    assert abs(drawn.mean()) <= 0.15
    assert abs(drawn.std() - 1) <= 0.1
    assert batch["timesteps"][noised].unique().numel() == 3


def levels(collator: BagelDataCollator) -> torch.Tensor:
    part = {"type": "vae_image", "image": golden_image("square"), "loss": True}
    part["image"].load()
    samples = [collator.encode({"segments": [part] * 50}, seed) for seed in range(20)]
    return torch.stack([block.timestep for sample in samples for block in sample.blocks])


def test_noised_copies_are_drawn_alike_and_do_not_see_each_other(collate, model):
    (sample,) = training_samples("edit")
    batch = collate(noised_copies=3)([sample])
    single = collate()([sample])
    length = single["input_ids"].shape[1]
    blocks = len(batch["timesteps"])
    assert blocks == len(single["timesteps"]) + 2
    # The three blocks at the end stand at one position.
    assert batch["position_ids"][0, length - 1 :].unique().numel() == 1
    noised = torch.arange(blocks)[batch["timesteps"] > 0]
    assert batch["timesteps"][noised].unique().numel() == 3
    counts = batch["latent_grid_hw"].prod(-1).tolist()
    parts = {name: batch[name].split(counts) for name in ("latents", "noise")}
    velocities = model(**batch).velocity.split(counts)
    for index in noised:
        clean = [place for place in range(blocks) if place < noised[0]]
        chosen = [*clean, int(index)]
        alone = single | {name: torch.cat([values[place] for place in chosen]) for name, values in parts.items()}
        alone["timesteps"] = batch["timesteps"][chosen]
        velocity = model(**alone).velocity[-counts[index] :]
        assert max_error(velocity, velocities[index]) < 1e-5


def test_a_conversation_goes_on_after_noised_copies(collate):
    batch = collate(noised_copies=2)(training_samples("chat"))
    single = collate()(training_samples("chat"))
    extra = batch["input_ids"].shape[1] - single["input_ids"].shape[1]
    assert extra == sum(int(grid.prod()) + 2 for grid in single["latent_grid_hw"][single["timesteps"] > 0])
    assert batch["position_ids"].max() == single["position_ids"].max()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.0, 0.5)])
def test_levels_are_sigmoids_of_normal_numbers(mean, std, collate):
    normal = levels(collate(logit_mean=mean, logit_std=std)).logit()
    # 1000 draws: four standard deviations of the mean, and of the standard deviation.
    assert abs(normal.mean() - mean) <= 4 * std / 1000**0.5
    assert abs(normal.std() - std) <= 4 * std / 2000**0.5
    within = ((normal - mean).abs() <= std).float().mean()
    assert abs(within - 0.6827) <= 0.06


def test_levels_may_be_uniform(collate):
    uniform = levels(collate(timestep_law="uniform"))
    assert (uniform > 0).all()
    assert (uniform <= 1).all()
    largest_gap = (uniform.sort().values - torch.linspace(0, 1, 1000)).abs().max()
    # Kolmogorov-Smirnov: exceeded once in a million.
    assert largest_gap <= 0.085


def test_the_shift_moves_levels_towards_noise(collate):
    plain, shifted = levels(collate()), levels(collate(timestep_shift=3.0))
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain), atol=1e-6)
    assert (shifted > plain).all()


def test_transparent_images_are_pasted_on_white(collate):
    plain = golden_image("wide").convert("RGB")
    clear = Image.new("RGBA", plain.size, (255, 0, 0, 0))
    white = Image.new("RGB", plain.size, (255, 255, 255))
    ours, theirs = collate()([drawing(clear), looking_at(clear)]), collate()([drawing(white), looking_at(white)])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert torch.equal(ours["latents"], theirs["latents"])


@pytest.mark.parametrize(
    "given",
    [
        {"bytes": PNG, "path": None},
        {"bytes": PNG, "path": "wide.png"},
        {"bytes": None, "path": str(GOLDEN / "inputs" / "wide.png")},
        str(GOLDEN / "inputs" / "wide.png"),
    ],
)
def test_images_that_datasets_did_not_decode(given, collate):
    for make in (looking_at, drawing):
        ours, theirs = collate().encode(make(given), 0), collate().encode(make(golden_image("wide")), 0)
        assert torch.equal(ours.input_ids, theirs.input_ids)
        pixels = [[*sample.patches, *(image.pixels for image in sample.latent_images)] for sample in (ours, theirs)]
        assert all(map(torch.equal, *pixels))


def test_a_table_of_datasets_gives_what_the_dicts_give(collate, tmp_path):
    datasets = pytest.importorskip("datasets")
    samples = [
        {
            "id": "a",
            "messages": [turn("user", {"type": "image"}, "make it red"), turn("assistant", {"type": "image"})],
        },
        {
            "id": "b",
            "messages": [turn("user", "hello"), turn("assistant", {"type": "text", "text": "hi", "loss": True})],
        },
    ]
    samples[0]["images"] = [golden_image("wide"), golden_image("square")]
    samples[1]["images"] = []
    text = datasets.Value("string")
    part = {"type": text, "text": text, "loss": datasets.Value("bool")}
    features = datasets.Features(
        {
            "id": text,
            "messages": datasets.List({"role": text, "content": datasets.List(part)}),
            "images": datasets.List(datasets.Image()),
        }
    )
    table = datasets.Dataset.from_list(samples, features=features)
    # Arrow gives each part all keys, with `None` where it had none.
    assert table[1]["messages"][0]["content"][0]["loss"] is None
    undecoded = table.cast_column("images", datasets.List(datasets.Image(decode=False)))
    expected = collate(generator=torch.Generator().manual_seed(0))(samples)
    for source in (table, undecoded):
        batch = collate(generator=torch.Generator().manual_seed(0))([source[0], source[1]])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_drawing_and_training_encode_an_image_alike(dtype, processor, vae):
    own_vae = copy.deepcopy(vae).to(dtype)
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, vae=own_vae, processor=processor, transformer=load_model())
    pixels = processor.image_processor(golden_image("wide"), return_vae_pixel_values=True, return_tensors="pt")
    (pixels,) = pixels["vae_pixel_values"]
    trained = LatentEncoder(own_vae, pipe.latent_patch_size)(pixels)
    drawn = pipe.encode_image(pixels, vae_sample_mode="argmax")
    assert trained.dtype == drawn.dtype == torch.float32
    assert torch.equal(trained, drawn)


def test_a_float16_vae_that_would_overflow_runs_in_float32(collate, vae):
    samples = [drawing(golden_image("square"))]
    expected = collate()(samples)["latents"]
    half = copy.deepcopy(vae).to(torch.float16)
    assert half.config.force_upcast
    rounded = collate(vae=half)(samples)["latents"]
    assert half.dtype == torch.float32
    assert max_error(rounded, expected) <= 2e-2
    half = copy.deepcopy(vae).to(torch.float16)
    half.register_to_config(force_upcast=False)
    collate(vae=half)(samples)
    assert half.dtype == torch.float16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_and_latents_that_are_not_finite_are_refused(value, vae):
    pixels, latents = torch.zeros(3, 64, 64), torch.zeros(1, vae.config.latent_channels, 8, 8)
    pixels[0, 3, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        encode_posterior(vae, pixels)
    latents[0, 0, 3, 3] = value
    with pytest.raises(ValueError, match="decoded latents to NaN or infinity"), torch.no_grad():
        decode_latents(vae, latents)


def test_patches_become_the_image_they_were_made_of():
    image = torch.arange(4 * 6 * 10).view(4, 6, 10)
    patches = patchify(image, 2)
    assert torch.equal(unpatchify(patches, (3, 5), 2), image)
    assert torch.equal(unpatchify(torch.stack([patches, patches + 1]), (3, 5), 2), torch.stack([image, image + 1]))


# ---- Latents on disk


def test_cached_latents_are_the_same_and_call_no_vae(collate, vae, tmp_path):
    samples = training_samples("chat", "edit")
    plain = collate(vae_sample_mode="sample", generator=torch.Generator().manual_seed(0))(samples)
    calls = []
    hook = vae.encoder.register_forward_pre_hook(lambda module, args: calls.append(1))
    counts = []
    for _ in range(2):
        # A new collator is a new run: what it knows is on the disk.
        collator = collate(vae_sample_mode="sample", generator=torch.Generator().manual_seed(0), cache_dir=tmp_path)
        batch = collator(samples)
        assert all(torch.equal(batch[name], plain[name]) for name in plain)
        counts.append(len(calls))
    hook.remove()
    # Three different images in four places; the second run reads them all.
    assert counts == [3, 3]
    assert len(list(tmp_path.iterdir())) == 3


def test_the_cache_holds_the_posterior_not_one_sample(collate, tmp_path):
    collator = collate(vae_sample_mode="sample", cache_dir=tmp_path)
    sample = drawing(golden_image("square"))
    first, second = (collator.pack([collator.encode(sample, seed)])["latents"] for seed in (0, 1))
    assert max_error(first, second) > 1e-3
    mean = collate(cache_dir=tmp_path).pack([collator.encode(sample, 0)])
    assert torch.equal(mean["latents"], first)


def test_another_vae_shares_no_cached_latents(collate, vae, tmp_path):
    other = type(vae).from_config(vae.config)
    other.load_state_dict(vae.state_dict())
    with torch.no_grad():
        other.quant_conv.weight.add_(0.1) if other.quant_conv is not None else other.encoder.conv_out.bias.add_(0.1)
    samples = [drawing(golden_image("square"))]
    ours = collate(cache_dir=tmp_path)(samples)["latents"]
    theirs = collate(cache_dir=tmp_path, vae=other)(samples)["latents"]
    assert max_error(ours, theirs) > 1e-3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_file_of_the_cache_is_written_again(collate, tmp_path):
    samples = [drawing(golden_image("square"))]
    expected = collate(cache_dir=tmp_path)(samples)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert torch.equal(collate(cache_dir=tmp_path)(samples)["latents"], expected["latents"])
    assert path.read_bytes() == whole


# ---- Choices and seeds


def test_a_sample_does_not_depend_on_its_batch(collate):
    collator = collate(text_dropout=0.5, vit_dropout=0.5, vae_dropout=0.5, vae_sample_mode="sample")
    (sample,) = training_samples("chat")
    alone = collator.pack([collator.encode(sample, seed=5)])
    others = [collator.encode(other, seed=6) for other in training_samples("edit", "talk")]
    together = collator.pack([others[0], collator.encode(sample, seed=5), others[1]])
    own = together["document_ids"][0] == 1
    for name in ("input_ids", "labels", "position_ids", "mm_token_type_ids"):
        assert torch.equal(together[name][0, own], alone[name][0])
    before = sum(len(block.noise) for block in others[0].blocks)
    for name in ("latents", "noise"):
        assert torch.equal(together[name][before : before + len(alone[name])], alone[name])


def test_encoding_leaves_the_global_generator_alone(collate):
    state = torch.get_rng_state()
    collator = collate(text_dropout=0.5, vae_sample_mode="sample")
    collator.pack([collator.encode(training_samples("chat")[0], seed=0)])
    collate(generator=torch.Generator().manual_seed(0))(training_samples("chat"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("own", [True, False])
def test_the_generator_decides_all_choices(own, collate):
    def batches(seed: int) -> list:
        if own:
            collator = collate(generator=torch.Generator().manual_seed(seed), text_dropout=0.5, vae_dropout=0.5)
        else:
            torch.manual_seed(seed)
            collator = collate(text_dropout=0.5, vae_dropout=0.5)
        return [collator(training_samples("chat", "edit")) for _ in range(2)]

    first, again, other = batches(0), batches(0), batches(1)
    for ours, theirs in zip(first, again, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert first[0]["timesteps"].tolist() != first[1]["timesteps"].tolist()
    assert first[0]["timesteps"].tolist() != other[0]["timesteps"].tolist()


def test_workers_of_a_plain_data_loader_draw_different_noise(collate):
    torch.manual_seed(0)
    loader = DataLoader(training_samples("draw") * 4, batch_size=1, collate_fn=collate(), num_workers=2)
    drawn = [batch["timesteps"].item() for _ in range(2) for batch in loader]
    assert len(set(drawn)) == 8


def test_a_collator_can_be_pickled(collate):
    # Workers that are spawned, not forked, get it this way.
    collator = pickle.loads(pickle.dumps(collate()))
    (sample,) = training_samples("chat")
    ours, theirs = (item.pack([item.encode(sample, 0)]) for item in (collator, collate()))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Settings, and what they gave when they were first released: a hash of the whole numbers, and some of the others.
KNOWN_BATCHES = {
    "in_one_sequence": (
        {"next_action": "none"},
        "2379ea8682ce86be",
        [0.651016, 0.0, 0.656456, 0.0, 0.780161, 0.296216],
        [1.2167, -6.70394, 0.0, 0.0, 4.42963],
        [-0.26306, -1.23627, -0.09229],
    ),
    "in_two_sequences": (
        {
            "max_tokens": 250,
            "text_dropout": 0.5,
            "vit_dropout": 0.5,
            "vae_dropout": 0.5,
            "noised_copies": 2,
            "timestep_shift": 3.0,
        },
        "171cc173b6cc395f",
        [0.463035, 0.872993, 0.63934, 0.70669, 0.0, 0.914777, 0.493223],
        [1.57515, -3.12643, 1.53561, -8.83786, -1.81517, 0.13326],
        [0.02933, 0.38775, -1.64189, -1.89844],
    ),
}


@pytest.mark.parametrize("name", KNOWN_BATCHES)
def test_a_seed_gives_the_batch_that_it_always_gave(name, processor, vae):
    settings, digest, timesteps, noise, latents = KNOWN_BATCHES[name]
    collator = BagelDataCollator(processor, vae=vae, generator=torch.Generator().manual_seed(7), **settings)
    if "max_tokens" in settings:
        samples = training_samples("edit", "look", "draw", "talk", "edit")
        batch = collator.pack([collator.encode(sample, seed) for seed, sample in enumerate(samples)])
    else:
        batch = collator(training_samples("chat", "edit", "look", "draw", "talk"))
    found = hashlib.sha256()
    for key in ("input_ids", "labels", "mm_token_type_ids", "position_ids", "document_ids"):
        found.update(f"{key} {batch[key].tolist()}".encode())
    for key in ("image_grid_hw", "latent_grid_hw"):
        found.update(f"{key} {batch[key].tolist()}".encode())
    assert found.hexdigest().startswith(digest)
    assert batch["timesteps"].tolist() == pytest.approx(timesteps, abs=1e-5)
    assert batch["noise"].sum(-1)[::37].tolist() == pytest.approx(noise, abs=1e-4)
    assert batch["latents"].sum(-1)[::67].tolist() == pytest.approx(latents, abs=1e-3)


# ---- The layout


def test_a_layout_is_returned_when_it_is_asked_for(collate):
    samples = training_samples("edit", "look", "talk")
    plain = collate(generator=torch.Generator().manual_seed(0))(samples)
    batch = collate(generator=torch.Generator().manual_seed(0), return_layout=True)(samples)
    layout = batch.pop("layout")
    assert batch.keys() == plain.keys()
    assert all(torch.equal(batch[key], plain[key]) for key in plain)
    for name, key in (
        ("token_types", "mm_token_type_ids"),
        ("document_ids", "document_ids"),
        ("labels", "labels"),
        ("image_grid_hw", "image_grid_hw"),
        ("latent_grid_hw", "latent_grid_hw"),
    ):
        assert torch.equal(getattr(layout, name), batch[key])
    noised = batch["timesteps"].repeat_interleave(batch["latent_grid_hw"].prod(-1)) > 0
    assert noised.any()
    assert torch.equal(layout.noised[layout.token_types == LATENT_TOKEN], noised)
    assert torch.equal(layout.position_ids(), batch["position_ids"])


def test_a_layout_stays_on_the_cpu_when_the_batch_moves(collate):
    batch = collate(return_layout=True)(training_samples("edit")).to("meta")
    assert batch["input_ids"].device.type == "meta"
    assert batch["layout"].token_types.device.type == "cpu"


# ---- Workers


class DeviceVae:
    """A VAE of an accelerator: it runs, but not in another process, and cannot be sent there."""

    def __init__(self, vae):
        self.vae = vae
        self.config = vae.config
        self.dtype = vae.dtype
        self.device = torch.device("cuda")

    def encode(self, pixels):
        raise AssertionError("it would have been run in a worker")


def test_a_worker_refuses_a_vae_of_an_accelerator(collate, vae):
    collator = collate(vae=DeviceVae(vae))
    loader = DataLoader(training_samples("talk", "draw"), batch_size=1, collate_fn=collator, num_workers=1)
    batches = iter(loader)
    # Texts need none.
    assert "latents" not in next(batches)
    with pytest.raises(RuntimeError, match="(?s)lies on cuda.*BagelDataLoader"):
        next(batches)


def test_a_worker_of_a_plain_data_loader_warns_of_what_it_left_out(collate, tmp_path):
    collator = collate(on_error="skip")
    bad = {"id": "bad", "messages": [turn("robot", "a")]}
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("transformers_bagel").addHandler(handler)
    try:
        for _ in DataLoader([*training_samples("talk"), bad], batch_size=2, collate_fn=collator, num_workers=1):
            pass
    finally:
        logging.getLogger("transformers_bagel").removeHandler(handler)
    assert "Left out sample 1 (id 'bad')" in (tmp_path / "log").read_text()


# ---- Bad samples


def bad_samples() -> dict:
    """Each with the error and what its message tells."""
    return {
        "no_target": ({"messages": [turn("user", "a")]}, ValueError, "no target"),
        "no_dict": (3, TypeError, "must be a dict"),
        "image_missing": (looking_at("/nowhere/absent.png"), ValueError, "/nowhere/absent.png"),
        "path_missing": (
            looking_at({"bytes": None, "path": "/nowhere/absent.png"}),
            ValueError,
            "/nowhere/absent.png",
        ),
        "nothing_in_the_dict": (looking_at({"bytes": None, "path": None}), TypeError, "`images`"),
        "corrupt_bytes": (looking_at({"bytes": PNG[:200], "path": None}), OSError, "truncated"),
        "no_image_bytes": (looking_at({"bytes": b"not an image", "path": None}), ValueError, "identify"),
        "unknown_role": ({"messages": [turn("robot", "a")]}, ValueError, "unknown role 'robot'"),
        "over_the_budget": (looking_at(golden_image("wide"), id="long"), ValueError, r"\(id 'long'\).*more than"),
        "placeholder_in_a_text": (
            {"messages": [turn("user", "a <|image_pad|>"), turn("assistant", "b")]},
            ValueError,
            "stand for images",
        ),
        "latent_placeholder_in_a_learned_text": (
            {"messages": [turn("user", "a"), turn("assistant", "<|vision_pad|>")]},
            ValueError,
            "stand for images",
        ),
    }


@pytest.mark.parametrize("name", bad_samples())
def test_a_bad_sample_stops_with_its_name(name, collate):
    sample, error, message = bad_samples()[name]
    good = training_samples("talk")[0]
    with pytest.raises(error, match=rf"(?s)^Sample 1\b.*{message}"):
        collate(max_tokens=60)([good, sample, good])


@pytest.mark.parametrize("name", bad_samples())
def test_a_bad_sample_is_left_out_with_its_name(name, collate):
    sample, _, message = bad_samples()[name]
    collator = collate(max_tokens=60, on_error="skip")
    good = training_samples("talk")[0]
    batch = collator([good, sample, good])
    assert torch.equal(batch["input_ids"], collate(max_tokens=60)([good, good])["input_ids"])
    (skipped,) = collator.skipped
    assert re.search(rf"(?s)^sample 1\b.*{message}", f"{skipped.name}: {skipped.reason}")


def test_a_sample_that_is_left_out_again_is_noted_once(collate):
    collator = collate(on_error="skip")
    for _ in range(2):
        collator([*training_samples("talk"), looking_at("/nowhere/absent.png")])
    assert len(collator.skipped) == 1


def test_a_sample_of_just_the_budget_fits(collate):
    (sample,) = training_samples("look")
    length = len(collate().encode(sample, 0))
    assert collate(max_tokens=length)([sample])["input_ids"].shape == (1, length)
    with pytest.raises(ValueError, match=rf"It takes {length} tokens, more than `max_tokens` \({length - 1}\)"):
        collate(max_tokens=length - 1)([sample])


def test_a_batch_of_bad_samples_alone_has_nothing_to_learn(collate, model):
    collator = collate(on_error="skip")
    batch = collator([3, looking_at("/nowhere/absent.png")])
    assert [item.name for item in collator.skipped] == ["sample 0", "sample 1"]
    assert batch["input_ids"].shape == (1, 1)
    assert model(**batch).loss.item() == 0


def test_drawing_needs_a_vae(collate):
    with pytest.raises(ValueError, match="Sample 0: .*Pass a `vae`"):
        collate(vae=None)(training_samples("draw"))


@pytest.mark.parametrize(
    "setting",
    [
        {"processor": None},
        {"text_dropout": 1.5},
        {"vit_dropout": -0.1},
        {"vae_dropout": True},
        {"vae_dropout": float("nan")},
        {"vae_sample_mode": "median"},
        {"timestep_law": "normal"},
        {"timestep_shift": 0.0},
        {"logit_std": 0.0},
        {"max_tokens": 0},
        {"max_tokens": 10.5},
        {"noised_copies": 0},
        {"noised_copies": True},
        {"on_error": "ignore"},
    ],
)
def test_settings_that_cannot_be_used_are_named(setting, processor):
    with pytest.raises((ValueError, TypeError), match=f"`{next(iter(setting))}`"):
        BagelDataCollator(**({"processor": processor} | setting))


# ---- Found in review


def rotated() -> bytes:
    """A picture that a camera held upright: its EXIF data say how to turn it."""
    stream = io.BytesIO()
    image = golden_image("wide").convert("RGB")
    exif = image.getexif()
    exif[0x112] = 6
    image.save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def test_undecoded_bytes_stand_upright_as_a_file_does(collate, tmp_path):
    path = tmp_path / "rotated.jpg"
    path.write_bytes(rotated())
    from_file = collate()([looking_at(str(path))])["image_grid_hw"]
    from_bytes = collate()([looking_at({"bytes": rotated(), "path": None})])["image_grid_hw"]
    assert from_bytes.tolist() == from_file.tolist()


def test_undecoded_bytes_over_pillows_limit_are_left_out_as_a_file_is(collate, monkeypatch):
    # Pillow raises at twice its limit, before the image is loaded, and its error is no ValueError.
    samples = [*training_samples("talk"), looking_at({"bytes": PNG, "path": None})]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    collator = collate(on_error="skip")
    collator(samples)
    assert [item.name for item in collator.skipped] == ["sample 1"]


def test_workers_of_a_plain_data_loader_share_no_generator(collate):
    # Each worker, in each epoch, has a copy of the collator with the generator as it was: noise repeats.
    collator = collate(generator=torch.Generator().manual_seed(0))
    loader = DataLoader(training_samples("draw") * 4, batch_size=1, collate_fn=collator, num_workers=2)
    drawn = [batch["timesteps"].item() for _ in range(2) for batch in loader]
    assert len(set(drawn)) == 8


def test_a_broken_file_of_the_cache_does_not_stop_a_run_that_leaves_out_bad_samples(collate, tmp_path):
    good, bad = drawing(golden_image("square")), drawing(golden_image("wide"))
    collate(cache_dir=tmp_path)([bad])
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"")
    # Encoding it again would be as good as leaving it out.
    batch = collate(cache_dir=tmp_path, on_error="skip")([good, bad])
    assert batch["latent_grid_hw"].tolist() in ([[4, 4]], [[4, 4], [5, 8]])


def test_a_sample_of_undecoded_bytes_that_is_left_out_again_is_noted_once(collate):
    # Its reason tells the address of a stream, which differs every time.
    collator = collate(on_error="skip")
    for _ in range(2):
        collator([*training_samples("talk"), looking_at({"bytes": b"not an image", "path": None})])
    assert len(collator.skipped) == 1


def test_a_level_of_noise_is_never_that_of_a_condition(collate):
    # A sigmoid underflows far out: a drawing at level 0 would be taken for a clean condition and learned by nothing.
    encoded = collate(logit_mean=-200.0).encode(training_samples("draw")[0], seed=0)
    assert encoded.blocks[0].timestep > 0


@pytest.mark.parametrize("name", ["nested_messages", "images_of_a_number"])
def test_odd_samples_are_told_what_is_wrong(name, collate):
    odd = {
        # A batch of conversations where one belongs passes the check, and fails with "list indices must be ...".
        "nested_messages": ({"messages": [[turn("user", "a"), turn("assistant", "b")]]}, "`messages`"),
        # "object of type 'int' has no len()"
        "images_of_a_number": ({"messages": [turn("assistant", "b")], "images": 5}, "`images`"),
    }
    sample, message = odd[name]
    with pytest.raises((TypeError, ValueError), match=message):
        collate().encode(sample, seed=0)


def test_an_image_that_the_vae_cannot_encode_stops_with_the_samples_name(collate, vae):
    samples = [*training_samples("draw"), drawing(golden_image("wide"), id="odd")]
    with pytest.raises(ValueError, match=r"^Sample 1 \(id 'odd'\): The VAE encoded an image to NaN"):
        collate(vae=PickyVae(vae))(samples)


def test_an_image_that_the_vae_cannot_encode_is_left_out_and_not_kept(collate, vae, tmp_path):
    good = training_samples("draw")
    collator = collate(vae=PickyVae(vae), on_error="skip", cache_dir=tmp_path)
    batch = collator([*good, drawing(golden_image("wide"))])
    assert torch.equal(batch["latents"], collate()(good)["latents"])
    assert [item.name for item in collator.skipped] == ["sample 1"]
    assert len(list(tmp_path.iterdir())) == 1


def test_kept_latents_that_are_not_finite_are_encoded_again(collate, tmp_path):
    samples = training_samples("draw")
    expected = collate(cache_dir=tmp_path)(samples)["latents"]
    (path,) = tmp_path.iterdir()
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)
    assert torch.equal(collate(cache_dir=tmp_path)(samples)["latents"], expected)


@pytest.mark.parametrize("name", ["talk", "edit"])
def test_a_sample_beyond_the_models_positions_cannot_be_used(name, collate):
    samples = training_samples(name)
    # Whether or not a text of it happens to be dropped.
    positions = int(collate()(samples)["position_ids"].max()) + 1
    for dropout in (0.0, 1.0):
        collate(text_dropout=dropout, max_positions=positions)(samples)
        with pytest.raises(ValueError, match=rf"^Sample 0: It takes {positions} rope positions, more than"):
            collate(text_dropout=dropout, max_positions=positions - 1)(samples)
    collator = collate(on_error="skip", max_positions=positions - 1)
    collator(samples)
    assert len(collator.skipped) == 1
