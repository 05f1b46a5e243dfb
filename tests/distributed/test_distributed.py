"""Two CPU processes (gloo) compute what one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).with_name("worker.py")


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


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "tp"])
def test_two_processes_equal_one(mode):
    done = launch(str(WORKER), mode)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
