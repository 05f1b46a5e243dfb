"""The commands and training scripts take the device by themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import is_datasets_available

from tests.conftest import golden_image
from tests.gpu.common import ROOT, SHAPES, needs_accelerator


pytestmark = needs_accelerator


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_draw_and_ask(tmp_path: Path):
    picture = str(tmp_path / "drawn.png")
    command = (sys.executable, "-m", "diffusers_bagel")
    prompt = "a large red circle in the middle on a white background"
    run(*command, "draw", prompt, "--model", str(SHAPES), "-o", picture)
    assert run(*command, "ask", picture, "what colour is the circle?", "--model", str(SHAPES)).strip() == "red"


@pytest.mark.skipif(not is_datasets_available(), reason="datasets is not installed")
@pytest.mark.parametrize("script", ["train_lora.py", "train_full.py"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_scripts(script, precision, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("wide", "square", "tall"):
        golden_image(name).convert("RGB").resize((64, 64)).save(pictures / f"{name}.png")
    sizes = ["--instance_data_dir", str(pictures), "--instance_prompt", "a red circle", "--max_train_steps", "3"]
    places = ["--pretrained_model_name_or_path", str(SHAPES), "--output_dir", str(tmp_path / "out")]
    settings = ["--mixed_precision", precision, "--gradient_checkpointing", "--dataloader_num_workers", "1"]
    run(sys.executable, f"examples/{script}", *sizes, *places, *settings)
