"""Tensors that are read out of files without mapping them: the same as safetensors gives, and no more than was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from transformers_bagel.checkpoints import open_tensors
from transformers_bagel.stored_tensors import DTYPES


TENSORS = {
    "matrix": torch.arange(35.0).view(5, 7).bfloat16(),
    "cube": torch.arange(24).view(2, 3, 4),
    "vector": torch.arange(9.0),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}
INDICES = [
    ...,
    slice(1, 3),
    (slice(0, 2), slice(1, 2)),
    (slice(None), slice(2, 3)),
    slice(0, 0),
    slice(None, None, 2),
]


@pytest.fixture
def file(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_an_index_gives_what_a_slice_of_safetensors_gives(name, index, file):
    if index is not ... and TENSORS[name].dim() < (len(index) if isinstance(index, tuple) else 1):
        return
    tensor = open_tensors([file])[name]
    with safe_open(file, framework="pt") as opened:
        expected = opened.get_slice(name)
        assert (tensor.get_shape(), tensor.get_dtype()) == (expected.get_shape(), expected.get_dtype())
        assert torch.equal(tensor[index], TENSORS[name][index])
    assert tensor[index].dtype == TENSORS[name].dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_is_read_as_it_was_written(dtype, tmp_path):
    content = torch.arange(48, dtype=torch.uint8).view(dtype).clone() if dtype != torch.bool else torch.eye(4) > 0
    save_file({"a": content}, tmp_path / "a.safetensors")
    read = open_tensors([tmp_path / "a.safetensors"])["a"][...]
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), content.view(torch.uint8))


def test_a_file_that_becomes_shorter_after_it_was_opened_is_named(file):
    tensors = open_tensors([file])
    with open(file, "rb+") as stream:
        stream.truncate(file.stat().st_size - 1)
    last = max(tensors.values(), key=lambda tensor: tensor.end)
    with pytest.raises(OSError, match=rf"{file.name}' ends in the middle of '{last.name}'"):
        last[...]
