"""Two CPU processes (gloo) compute what one does."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import CHECKPOINT
from tests.examples.conftest import PROMPT, arguments, assert_same, save_pictures, saved_weights, validation_picture


WORKER = Path(__file__).with_name("worker.py")
EXAMPLES = Path(__file__).parents[2] / "examples"


def launch(*command: str, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run a script in two processes; a hang is a failure."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # Without MPI accelerate starts several processes under this name only; the script itself asks for the CPU.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    return subprocess.run(
        [*launcher, "--main_process_port", port, *command],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "tp", "split"])
def test_two_processes_equal_one(mode):
    done = launch(str(WORKER), mode)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red circle\na blue square\na green star\n", encoding="utf-8")
    return file


def many_images(prompts: Path, folder: Path, *more: str) -> list[str]:
    settings = ["--model", str(CHECKPOINT), "--dtype", "float32", "--size", "64", "--steps", "3", "--cpu", *more]
    return [str(EXAMPLES / "many_images.py"), str(prompts), str(folder), *settings]


@pytest.fixture(scope="module")
def drawn_by_one(prompts) -> Path:
    folder = prompts.parent / "one"
    # As many threads as each of two has, since other sums round otherwise.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *many_images(prompts, folder)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("split", ["pictures", "latents", "layers"])
def test_two_processes_draw_the_pictures_of_one(split, prompts, drawn_by_one, tmp_path):
    done = launch(*many_images(prompts, tmp_path, "--split", split))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    pictures = sorted(file.name for file in drawn_by_one.iterdir())
    assert pictures == sorted(file.name for file in tmp_path.iterdir()) == ["00000.png", "00001.png", "00002.png"]
    for name in pictures:
        pixels = [np.asarray(Image.open(folder / name)).astype(int) for folder in (drawn_by_one, tmp_path)]
        # Sums in another order may fall on the other side of a rounding.
        assert np.abs(pixels[0] - pixels[1]).max() <= (1 if split == "layers" else 0)


def test_a_split_step_is_measured():
    script = Path(__file__).parents[2] / "benchmarks" / "split.py"
    done = launch(str(script), "--width", "golden", "--latents", "64", "--repeats", "1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (row,) = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("| 64 |")]
    assert float(row[-1]) <= 1e-5


@pytest.fixture
def settings(tmp_path) -> dict:
    base, pictures = tmp_path / "base", tmp_path / "pictures"
    subprocess.run([sys.executable, EXAMPLES / "tiny_checkpoint.py", base], check=True)
    save_pictures(pictures)
    return {
        "cpu": True,
        "pretrained_model_name_or_path": base,
        "instance_data_dir": pictures,
        "instance_prompt": "a shape",
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "learning_rate": 1e-3,
        "report_to": "none",
    }


def train(output_dir: Path, **settings) -> Path:
    done = launch(str(EXAMPLES / "train_full.py"), *arguments(**settings, output_dir=output_dir))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return output_dir


def test_sharded_training_with_an_average_resumes_bit_for_bit(settings, tmp_path):
    settings |= {
        "fsdp": True,
        "ema": True,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        # The resumed run does not repeat the one after step 2, which must leave no trace.
        "validation_steps": 1,
        "validation_prompt": PROMPT,
        "validation_inference_steps": 2,
        "validation_size": [64, 64],
        "num_validation_images": 1,
    }
    whole = train(tmp_path / "whole", **settings)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = train(tmp_path / "resumed", **settings, resume_from_checkpoint="latest")
    assert_same(saved_weights(resumed), saved_weights(whole))
    for step in (3, 4):
        assert validation_picture(resumed, step) == validation_picture(whole, step)


@pytest.mark.parametrize("mode", [{}, {"fsdp": True}], ids=["data parallel", "sharded"])
def test_two_processes_train_as_one_with_twice_the_batch(settings, tmp_path, mode):
    # Adam would blow up the rounding of gradients near zero.
    settings |= {"max_train_steps": 2, "adam_epsilon": 1e-2, "max_grad_norm": 1e6}
    two = train(tmp_path / "two", **settings, **mode, train_batch_size=1)
    command = arguments(**settings, train_batch_size=2, output_dir=tmp_path / "one")
    subprocess.run([sys.executable, EXAMPLES / "train_full.py", *command], check=True, capture_output=True)
    expected, before = saved_weights(tmp_path / "one"), saved_weights(settings["pretrained_model_name_or_path"])
    for name, weight in saved_weights(two).items():
        assert (weight - expected[name]).abs().max() <= 1e-5, name
    moved = [name for name, weight in expected.items() if (weight - before[name]).abs().max() > 1e-4]
    assert any("moe_gen" in name for name in moved)
