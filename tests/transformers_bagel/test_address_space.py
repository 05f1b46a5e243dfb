"""Every way of loading reads a file that is larger than what the process may address, as the published one is on many machines."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import CHECKPOINT
from tests.peak_memory import OVERHEAD, empty_model, peaks_of, write_checkpoint


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems limit no addresses")

# What is kept may be exceeded by this, above what a process takes in any case.
MARGIN = 1.15
# Float32 of a layer, and what it is rounded with.
ONE_LAYER = 4 * 4 * 1024 * 4096
MODEL = "BagelForConditionalGeneration"
HALF = ("visual_gen=False", {"visual_gen": False})
ON_DISK = "device_map={'model': 'disk', 'lm_head': 'cpu'}, offload_folder=Path(folder) / 'offloaded'"
# The loader, its arguments, modules that it leaves out, and bytes of a weight in a layer and of any other; none on the disk.
WAYS = {
    "half of the model in bfloat16": (MODEL, *HALF, 2, 2),
    "half of the model in float32": (MODEL, "visual_gen=False, dtype=torch.float32", HALF[1], 4, 4),
    "weights offloaded to the disk": (MODEL, ON_DISK, {}, 0, 0),
    "a pipeline with weights on the disk": ("BagelPipeline", ON_DISK, {}, 0, 0),
    "int8": (MODEL, "quantization_config=TorchAoConfig(Int8WeightOnlyConfig())", {}, 1, 2),
    "4 bits": (MODEL, "quantization_config=BitsAndBytesConfig(load_in_4bit=True)", {}, 0.5 + 4 / 64, 2),
}


def kept_bytes(modules: dict[str, bool], of_a_layer: float, of_others: float) -> float:
    return sum(
        tensor.numel() * (of_a_layer if ".layers." in name and "_proj" in name else of_others)
        for name, tensor in empty_model(**modules).state_dict().items()
    )


@pytest.fixture(scope="module")
def large_file(tmp_path_factory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("large"), "BF16", torch.bfloat16)
    for name in ("ae.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_file_larger_than_the_address_space_loads_into_little_more_than_what_is_kept(way, large_file):
    loader, arguments, modules, *sizes = WAYS[way]
    limit = int(MARGIN * kept_bytes(modules, *sizes)) + OVERHEAD + (ONE_LAYER if "quantization" in arguments else 0)
    size = (large_file / "model.safetensors").stat().st_size
    # Or the file could have been mapped beside what is kept.
    assert limit < size + kept_bytes(modules, *sizes)
    assert way in peaks_of({way: (loader, str(large_file), arguments)}, limits={way: limit})
