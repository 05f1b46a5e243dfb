"""accelerate's maps of devices, on a machine that has memory and a disk."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights, load_checkpoint_and_dispatch

from tests.conftest import load_model
from transformers_bagel import BagelForConditionalGeneration


IDS = torch.tensor([[5, 6, 7, 8, 9]])


def assert_is(model, expected) -> None:
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)


@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_strategy_puts_on_the_disk_what_does_not_fit(strategy, model, tmp_path):
    spread = load_model(device_map=strategy, max_memory={"cpu": "400KB"}, offload_folder=tmp_path)
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    assert_is(spread, model)


def test_a_map_may_name_every_part(model, tmp_path):
    parts = {name: "cpu" for name, _ in model.model.named_children() if name != "language_model"}
    parts |= {f"language_model.{name}": "cpu" for name, _ in model.model.language_model.named_children()}
    parts.pop("language_model.layers")
    parts |= {f"language_model.layers.{index}": "disk" if index else "cpu" for index in range(3)}
    given = {f"model.{name}": device for name, device in parts.items()} | {"lm_head": "cpu"}
    assert_is(load_model(device_map=given, offload_folder=tmp_path), model)


def test_a_model_in_memory_is_dispatched(model, tmp_path):
    own = load_model()
    found = infer_auto_device_map(own, {"cpu": "500KB", "disk": "1GB"}, own._no_split_modules)
    assert_is(dispatch_model(own, found, offload_dir=tmp_path), model)


def test_accelerates_own_loader_reads_files_with_the_names_of_modules(model, tmp_path):
    """It knows no renaming; the names of the original checkpoint are what is saved otherwise."""
    model.save_pretrained(tmp_path, save_original_format=False)
    with init_empty_weights():
        own = BagelForConditionalGeneration(model.config).eval()
    assert_is(load_checkpoint_and_dispatch(own, tmp_path, device_map="auto"), model)
