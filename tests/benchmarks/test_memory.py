"""The benchmark of memory measures what its table says, and the errors stay within what the documentation says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import CHECKPOINT, load_model
from tests.processes import run_in_a_fork
from transformers_bagel import BagelConfig


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def memory():
    """benchmarks/memory.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import memory

        yield memory


@pytest.fixture(scope="module")
def documented() -> dict[str, list[str]]:
    """Cells of the table of docs/memory.md, by the name of their row."""
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")
    ]
    return {cells[0]: cells[1:] for cells in rows}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_row_is_measured_in_a_process_of_its_own(memory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory.subprocess, "run", run_in_a_fork)
    file = tmp_path / "memory.json"
    memory.main(["--ways", "torchao int8", "understanding only", "--steps", "1", "--json", str(file)])
    quantized, half = json.loads(file.read_text())["rows"]
    expected = memory.weight_bytes(memory.middle_config(), memory.WAYS["torchao int8"])
    assert abs(quantized["disk_bytes"] / expected - 1) < 0.02
    assert expected < quantized["load_bytes"] < quantized["draw_bytes"]
    assert quantized["step_seconds"] > 0
    assert (
        abs(half["disk_bytes"] / memory.weight_bytes(memory.middle_config(), memory.WAYS["understanding only"]) - 1)
        < 0.01
    )
    assert "step_seconds" not in half
    printed = capsys.readouterr().out
    assert re.search(r"^\| torchao int8 \| \d+\.\d GB \| \d+ MiB \| ", printed, flags=re.MULTILINE)
    assert re.search(r"^\| understanding only \|.* – \|$", printed, flags=re.MULTILINE)


def test_calculated_sizes_are_those_of_files(memory, tmp_path):
    config = BagelConfig.from_pretrained(CHECKPOINT)
    load_model().save_pretrained(tmp_path)
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert abs(stored / memory.weight_bytes(config, memory.WAYS["float32"]) - 1) < 0.05
    assert f"{memory.weight_bytes(BagelConfig(), memory.WAYS['bfloat16']) / 1e9:.2f}" == "29.21"


def test_the_page_has_every_way(memory, documented):
    assert set(memory.WAYS) <= set(documented)


@pytest.mark.parametrize(
    "name",
    ["float32", "bfloat16", "torchao int8", "bitsandbytes int8", "bitsandbytes nf4", "float8 layers, cast"],
)
def test_golden_velocities_are_as_near_as_the_page_says(name, memory, documented):
    largest, relative = memory.golden_errors(memory.WAYS[name])
    # Other processors round in another order.
    assert largest <= 1.5 * float(documented[name][-2])
    assert relative <= 1.25 * float(documented[name][-1])
    assert name == "float32" or relative >= 0.5 * float(documented[name][-1])
