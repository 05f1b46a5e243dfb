"""Settings that are numbers of numpy or torch, as sweeps and tensors hand them out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.conftest import edges, golden_image, load_processor, training_samples
from transformers_bagel import BagelDataLoader


KINDS = pytest.mark.parametrize(
    ("whole", "number"), [(np.int64, np.float32), (np.array, np.array), (torch.tensor, torch.tensor)]
)


@KINDS
def test_settings_of_a_collator(whole, number, collate):
    plain, foreign = (
        collate(text_dropout=real(0.25), max_tokens=integer(400), timestep_shift=real(2.0), noised_copies=integer(2))
        for integer, real in ((int, float), (whole, number))
    )
    (sample,) = training_samples("draw")
    ours, theirs = (collator.encode(sample, seed=3) for collator in (plain, foreign))
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert [block.timestep for block in ours.blocks] == [block.timestep for block in theirs.blocks]


@KINDS
def test_settings_of_a_data_loader(whole, number, collate):
    samples = training_samples("talk", "look", "talk")
    loaders = [
        BagelDataLoader(samples, collate(), batch_size=integer(2), seed=integer(5), world_size=integer(1))
        for integer in (int, whole)
    ]
    batches = [next(iter(loader)) for loader in loaders]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert len({json.dumps(loader.state_dict()) for loader in loaders}) == 1


@KINDS
def test_settings_of_an_image_processor(whole, number, tmp_path):
    image = golden_image("wide")
    settings = {"patch_size": 14, "vae_stride": 16, "max_pixels": 40_000, "size": edges([70, 42, 14])}
    foreign = {name: whole(value) for name, value in settings.items() if name != "size"}
    foreign["size"] = {name: whole(value) for name, value in settings["size"].items()}
    expected = load_processor(**settings).image_processor(image)["pixel_values"]
    made = load_processor(**foreign).image_processor
    assert np.array_equal(made(image)["pixel_values"], expected)
    assert np.array_equal(load_processor().image_processor(image, **foreign)["pixel_values"], expected)
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["patch_size"] == 14
