"""Two CPU processes (gloo) compute what one does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import CHECKPOINT
from tests.examples.conftest import PROMPT, arguments, assert_same, save_pictures, saved_weights, validation_picture
from tests.processes import ROOT, run_script


EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "tp", "split"])
def test_two_processes_equal_one(mode):
    run_script(Path(__file__).with_name("worker.py"), mode, num_processes=2)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red circle\na blue square\na green star\n", encoding="utf-8")
    return file


def many_images(prompts: Path, folder: Path, *more: str) -> list[str]:
    settings = ["--model", str(CHECKPOINT), "--dtype", "float32", "--size", "64", "--steps", "3", "--cpu", *more]
    return [str(prompts), str(folder), *settings]


@pytest.fixture(scope="module")
def drawn_by_one(prompts) -> Path:
    folder = prompts.parent / "one"
    run_script(EXAMPLES / "many_images.py", *many_images(prompts, folder))
    return folder


@pytest.mark.parametrize("split", ["pictures", "latents", "layers"])
def test_two_processes_draw_the_pictures_of_one(split, prompts, drawn_by_one, tmp_path):
    run_script(EXAMPLES / "many_images.py", *many_images(prompts, tmp_path, "--split", split), num_processes=2)
    pictures = sorted(file.name for file in drawn_by_one.iterdir())
    assert pictures == sorted(file.name for file in tmp_path.iterdir()) == ["00000.png", "00001.png", "00002.png"]
    for name in pictures:
        pixels = [np.asarray(Image.open(folder / name)).astype(int) for folder in (drawn_by_one, tmp_path)]
        # Sums in another order may fall on the other side of a rounding.
        assert np.abs(pixels[0] - pixels[1]).max() <= (1 if split == "layers" else 0)


def test_a_split_step_is_measured():
    arguments = ["--width", "golden", "--latents", "64", "--repeats", "1"]
    printed = run_script(ROOT / "benchmarks" / "split.py", *arguments, num_processes=2)
    (row,) = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("| 64 |")]
    assert float(row[-1]) <= 1e-5


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    base, pictures = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("pictures")
    run_script(EXAMPLES / "tiny_checkpoint.py", str(base))
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
        # Measuring it takes a while.
        "peak_tflops": 1,
    }


def train(output_dir: Path, num_processes: int = 2, **settings) -> Path:
    words = arguments(**settings, output_dir=output_dir)
    run_script(EXAMPLES / "train_full.py", *words, num_processes=num_processes)
    return output_dir


def train_by_accelerate(output_dir: Path, **settings) -> Path:
    """As the page says, by `accelerate launch`."""
    # Without MPI accelerate starts several processes under this name only; the script itself asks for the CPU.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, *launcher, str(EXAMPLES / "train_full.py")]
    done = subprocess.run(
        [*command, *arguments(**settings, output_dir=output_dir)],
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return output_dir


@pytest.mark.slow
def test_sharded_training_with_an_average_resumes_bit_for_bit(settings, tmp_path):
    settings = settings | {
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
    whole = train_by_accelerate(tmp_path / "whole", **settings)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = train(tmp_path / "resumed", **settings, resume_from_checkpoint="latest")
    assert_same(saved_weights(resumed), saved_weights(whole))
    for step in (3, 4):
        assert validation_picture(resumed, step) == validation_picture(whole, step)


# Adam would blow up the rounding of gradients near zero.
COMPARED = {"max_train_steps": 2, "adam_epsilon": 1e-2, "max_grad_norm": 1e6}


@pytest.fixture(scope="module")
def trained_by_one(settings, tmp_path_factory) -> dict:
    """Weights of one process with both processes' batch."""
    return saved_weights(
        train(tmp_path_factory.mktemp("one"), num_processes=1, **settings, **COMPARED, train_batch_size=2)
    )


@pytest.mark.parametrize("mode", [{}, {"fsdp": True}], ids=["data parallel", "sharded"])
def test_two_processes_train_as_one_with_twice_the_batch(settings, trained_by_one, tmp_path, mode):
    two = train(tmp_path, **settings, **COMPARED, **mode, train_batch_size=1)
    before = saved_weights(settings["pretrained_model_name_or_path"])
    for name, weight in saved_weights(two).items():
        assert (weight - trained_by_one[name]).abs().max() <= 1e-5, name
    moved = [name for name, weight in trained_by_one.items() if (weight - before[name]).abs().max() > 1e-4]
    assert any("moe_gen" in name for name in moved)


# One rank alone has a loss that is not finite.
BROKEN_RANK = """
import os, sys
from contextlib import nullcontext
sys.path[:0] = [{root!r}, {examples!r}]
import train_full
from tests.examples.conftest import not_finite
with not_finite(2, accumulation=2) if os.environ["RANK"] == "1" else nullcontext():
    train_full.main(train_full.parse_args(sys.argv[1:]))
"""


@pytest.mark.parametrize("mode", [{}, {"fsdp": True, "ema": True}], ids=["data parallel", "sharded"])
def test_all_ranks_leave_out_a_step_that_is_not_finite_on_one(settings, tmp_path, mode):
    settings = settings | mode | {"train_batch_size": 1, "lr_scheduler": "constant"}
    once = train(tmp_path / "once", **settings, max_train_steps=1)
    script = tmp_path / "script.py"
    script.write_text(BROKEN_RANK.format(root=str(ROOT), examples=str(EXAMPLES)), encoding="utf-8")
    words = arguments(**settings, max_train_steps=2, output_dir=tmp_path / "two")
    printed = run_script(script, *words, num_processes=2)
    assert_same(saved_weights(tmp_path / "two"), saved_weights(once))
    (warning,) = [line for line in printed.splitlines() if "Left out step 2" in line]
    # Two of each rank.
    assert warning.count("sample ") == 4


def test_a_process_that_fails_ends_the_others(tmp_path):
    """Of the helper: what is run above would wait for each other until its time is over."""
    script = tmp_path / "script.py"
    script.write_text("import os, time\ntime.sleep(600) if os.environ['RANK'] == '0' else print(1 / 0)\n")
    with pytest.raises(AssertionError, match="script.py ended with code 1(.|\n)*ZeroDivisionError"):
        run_script(script, num_processes=2)
    script.write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(AssertionError, match="script.py ended with code -1"):
        run_script(script, timeout=0.5)
