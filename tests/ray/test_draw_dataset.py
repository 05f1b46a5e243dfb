"""`examples/draw_dataset.py` on a cluster of this machine: workers and the job are killed, and no file shows it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from .conftest import NO_RAY, ROOT, SHAPES


sys.path.insert(0, str(ROOT / "examples"))

import draw_dataset  # noqa: E402  # the scripts are no package


pytest.importorskip("ray", reason=NO_RAY)
pytestmark = pytest.mark.slow

COLOURS = ("red", "green", "blue", "yellow")
PROMPTS = [
    f"a large {colour} {shape} in the middle on a white background"
    for colour in COLOURS
    for shape in ("circle", "star", "square")
]
SETTINGS = f"--model {SHAPES} --dtype float32 --size 64 --steps 12 --guidance-scale 3 --shard-size 2".split()
# In three shards a job is stopped, and in the others goes on.
STOPPED_AFTER = 3


def command(folder: Path, workers: int) -> list[str]:
    script = ROOT / "examples" / "draw_dataset.py"
    return [
        sys.executable,
        str(script),
        str(folder.parent / "prompts.txt"),
        str(folder),
        *SETTINGS,
        "--workers",
        str(workers),
    ]


def lines_of(job: subprocess.Popen) -> tuple[str, int]:
    """The next shard that a job says is done, and the process that drew it."""
    for line in job.stdout:
        if said := re.match(r"(\d{5}): 2 pictures by process (\d+)", line):
            return said[1], int(said[2])
    raise AssertionError(f"the job ended with code {job.wait()}")


def stop(job: subprocess.Popen) -> None:
    """As a machine stops: the job, and all of the cluster that it had started."""
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    # Those whose parent was killed may stay as zombies, until the system asks for their codes.
    psutil.wait_procs(processes, timeout=20)


@dataclass
class Made:
    """Two datasets of the same prompts: one drawn here, one by two workers that were killed on the way, and then by one."""

    plain: Path
    troubled: Path
    said: dict[str, int]
    killed: int
    again: str


def draw_here(folder: Path) -> None:
    """What the command does, without Ray."""
    args = draw_dataset.parse_args(["prompts.txt", str(folder), *SETTINGS])
    settings = draw_dataset.settings_of(args)
    dataset = draw_dataset.Dataset(folder, draw_dataset.plan(PROMPTS, args.seed), settings, args.shard_size)
    drawer = draw_dataset.Drawer(settings)
    for number, tasks in enumerate(dataset.shards):
        draw_dataset.draw_shard(drawer.pipe, tasks, dataset.place(number), settings)
    dataset.merge()


@pytest.fixture(scope="module")
def made(tmp_path_factory, environment) -> Made:
    folder = tmp_path_factory.mktemp("datasets")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    plain, troubled = folder / "plain", folder / "troubled"
    draw_here(plain)
    job = subprocess.Popen(
        command(troubled, 2), env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    said = dict([lines_of(job)])
    (killed,) = said.values()
    os.kill(killed, signal.SIGKILL)
    while len(said) < STOPPED_AFTER:
        said |= dict([lines_of(job)])
    stop(job)
    lost = troubled / "shards" / min(said)
    (lost / f"{2 * int(lost.name):08}.png").write_bytes(b"cut off")
    done = subprocess.run(
        command(troubled, 1), env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    return Made(plain, troubled, said, killed, done.stdout)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_two_workers_that_were_killed_made_the_files_of_one(made):
    assert files(made.troubled) == files(made.plain)


def test_every_prompt_was_drawn_once(made):
    rows = [json.loads(line) for line in (made.troubled / "manifest.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert len({row["file"] for row in rows}) == len(list(made.troubled.glob("shards/*/*.png"))) == len(PROMPTS)


def test_the_other_worker_went_on(made):
    assert any(worker != made.killed for worker in made.said.values())


def test_what_was_there_was_not_drawn_again_but_what_had_lost_a_picture_was(made):
    whole = int(re.search(r"6 shards, (\d+) of them there", made.again)[1])
    again = re.findall(r"^(\d{5}): 2 pictures", made.again, flags=re.MULTILINE)
    assert whole >= STOPPED_AFTER - 1
    assert len(again) == len(set(again)) == 6 - whole
    assert set(again) & set(made.said) == {min(made.said)}
