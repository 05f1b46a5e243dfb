"""Scripts in processes of their own, which are forks of one that has imported the libraries: that takes longer than they do."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import datasets
import torch

from tests import rounded_convolutions  # noqa: F401  # in forks, too


ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["diffusers_bagel", "datasets", "tensorboard", "torch.distributed.fsdp"])


def run_script(
    script: Path, *arguments: str, num_processes: int = 1, timeout: float = 240, expected_code: int = 0
) -> str:
    """What `python SCRIPT ARGUMENTS` prints, or what its processes print that find each other as those of `torchrun` do.

    Each has one thread. As soon as one of them fails, the others, which would wait for it, are ended; so is a hang.
    """
    variables = [{"OMP_NUM_THREADS": "1"}] * num_processes
    if num_processes > 1:
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        together |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
        variables = [
            own | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank, own in enumerate(variables)
        ]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(num_processes)]
        processes = [
            CONTEXT.Process(target=become, args=(script, arguments, own, output), daemon=True)
            for own, output in zip(variables, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        code = first_failure(processes, timeout)
        printed = "".join(output.read_text(errors="replace") for output in outputs if output.exists())
    assert code == expected_code, f"{script.name} ended with code {code}:\n{printed[-6000:]}"
    return printed


def run_in_a_fork(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
    """For `subprocess.run` of `[python, SCRIPT, *ARGUMENTS]`."""
    return subprocess.CompletedProcess(command, 0, stdout=run_script(Path(command[1]), *command[2:]))


def first_failure(processes: list, timeout: float) -> int:
    """Wait for processes; the code of the first that failed, or -1 for a hang, after which none runs on, or zero."""
    deadline = time.monotonic() + timeout
    running = {process.sentinel: process for process in processes}
    code = 0
    while running and code == 0:
        ended = [running.pop(sentinel) for sentinel in wait(list(running), timeout=deadline - time.monotonic())]
        for process in ended:
            process.join()
        code = next((process.exitcode for process in ended if process.exitcode), 0 if ended else -1)
    for process in running.values():
        process.kill()
        process.join()
    return code


def become(script: Path, arguments: tuple[str, ...], variables: dict[str, str], output: Path) -> None:
    """Go on as `python SCRIPT ARGUMENTS` with environment variables, writing to a file."""
    with open(output, "wb") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    os.environ.update(variables)
    datasets.config.HF_DATASETS_CACHE = output.parent / "datasets"
    # Or the garbage collector would search, and so copy, what this process shares with the others.
    gc.freeze()
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
