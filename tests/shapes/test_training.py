"""The one command that trains from nothing, a few steps of it; and that its own loop goes on where it was killed."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import train
from accelerate.commands.launch import launch_command_parser
from stages import run_stage
from torch import nn
from train import main, stage

from diffusers_bagel import BagelPipeline
from tests.processes import CONTEXT, run_script
from tests.shapes.conftest import SHAPES
from transformers_bagel import BagelForConditionalGeneration, BagelProcessor


def learned(folder: Path, killed_at: int | None = None) -> nn.Module:
    """A layer that learns to double, killed once at a step if that is asked for."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)

    def losses(step: int) -> dict[str, torch.Tensor]:
        if step == killed_at and not (folder / "killed").exists():
            (folder / "killed").touch()
            raise KeyboardInterrupt
        given = torch.randn(8, 3)
        return {"loss": (layer(given) - 2 * given).square().mean()}

    run_stage(folder, layer, losses, num_steps=200, learning_rate=0.1, save_every=10)
    return layer


def test_a_killed_stage_goes_on_as_if_it_had_not(tmp_path):
    whole = learned(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path / "parts", killed_at=37)
    parts = learned(tmp_path / "parts", killed_at=37)
    assert torch.equal(whole.weight, parts.weight)
    logs = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert logs[-1]["loss"] < 0.1 < logs[0]["loss"]


def test_a_finished_stage_is_kept(tmp_path):
    runs = []

    def run(part: Path) -> None:
        runs.append(part)
        (part / "result").write_text(str(len(runs)))
        if len(runs) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "vae", run)
    assert not (tmp_path / "vae").exists()
    stage(tmp_path / "vae", run)
    stage(tmp_path / "vae", run)
    assert len(runs) == 2
    assert (tmp_path / "vae" / "result").read_text() == "2"


def run_in_forks(command: list[str], **kwargs: object) -> None:
    """`subprocess.run` for a command that starts the training script, maybe by accelerate's launcher."""
    script = command.index(str(train.TRAIN_FULL))
    launched = launch_command_parser().parse_args(command[3:]) if script > 1 else argparse.Namespace(num_processes=1)
    # Measuring the peak takes a while, and so do long steps.
    settings = (*command[script + 1 :], "--peak_tflops", "1", "--max_tokens", "1500")
    run_script(train.TRAIN_FULL, *settings, num_processes=launched.num_processes)


def shallow_model(*parts: object, new_model: Callable = train.new_model) -> BagelForConditionalGeneration:
    """One layer is trained in a sixth of the time."""
    model = new_model(*parts)
    settings, language_model = model.config.text_config, model.model.language_model
    settings.num_hidden_layers, settings.layer_types = 1, settings.layer_types[:1]
    language_model.layers = language_model.layers[:1]
    return model


@pytest.mark.slow
def test_the_command_makes_a_repository_that_both_libraries_load(tmp_path, monkeypatch):
    """Its processes are forks of one that has imported the libraries; the test below has its real ones."""
    monkeypatch.setattr(train.multiprocessing, "get_context", lambda method: CONTEXT)
    monkeypatch.setattr(train.subprocess, "run", run_in_forks)
    monkeypatch.setattr(train, "new_model", shallow_model)
    steps = {"vae": 2, "vit": 2, "understanding": 1, "joint": 3, "deciding": 3, "thinking": 3, "refining": 3}
    samples = {"understanding": 100, "joint": 40, "deciding": 6, "thinking": 6, "refining": 6}
    command = ["--output_dir", str(tmp_path / "run"), "--joint_decay_steps", "1", "--deciding_decay_steps", "1"]
    for name, count in samples.items():
        command += [f"--{name}_samples", str(count)]
    for name, count in steps.items():
        command += [f"--{name}_steps", str(count)]
    main(command)
    repository = tmp_path / "run" / "repository"
    pipe = BagelPipeline.from_pretrained(repository)
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (64, 64)
    model = BagelForConditionalGeneration.from_pretrained(repository)
    assert model.config.latent_dim == 32
    # Only what was frozen all along is as the second stage left it.
    before = BagelPipeline.from_pretrained(tmp_path / "run" / "understanding" / "training").transformer.state_dict()
    same = {name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])}
    frozen = {name for name in before if name.startswith("model.vision_tower.")}
    assert same == frozen | {name for name in before if name.endswith("_pos_embed.pos_embed")}
    assert "<|vision_pad|>" in BagelProcessor.from_pretrained(repository).tokenizer.get_vocab()
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.endswith(".part")] == []


@pytest.mark.slow
def test_no_stage_outlives_the_command(tmp_path):
    """Killed, it leaves nobody behind who would write into the folders of the next run."""
    command = [sys.executable, str(SHAPES / "train.py"), "--output_dir", str(tmp_path / "run"), "--vit_steps", "1"]
    process = subprocess.Popen([*command, "--understanding_samples", "50"], stderr=subprocess.DEVNULL)
    found: dict[str, psutil.Process] = {}
    try:
        while len(found) < 2:
            assert process.poll() is None
            time.sleep(0.2)
            for child in psutil.Process(process.pid).children():
                # Others come and go.
                with contextlib.suppress(psutil.NoSuchProcess):
                    line = " ".join(child.cmdline())
                    found |= {name: child for name in ("spawn_main", "train_full.py") if name in line}
        # The VAE's process asks to be ended as soon as it has started.
        while not (tmp_path / "run" / "vae.part").exists():
            assert process.poll() is None
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(found.values(), timeout=20)
    assert not alive


@pytest.mark.parametrize("setting", ["vae_steps", "joint_samples"])
def test_counts_below_one_are_named(setting, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path), f"--{setting}", "0"])
    assert f"--{setting}" in capsys.readouterr().err
