# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Replicas of bagel-shapes on Ray Serve: what two give over one, and what becomes of requests when one is killed.

    bash scripts/ray.sh benchmarks/replicas.py --seconds 30

Each picture is read by `examples/shapes/reader.py` against its prompt.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import httpx
import psutil
from openai import APIConnectionError, APIStatusError, OpenAI
from PIL import Image
from refusals import need_at_least, need_output


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "shapes"))

from judge import DrawCase, draw_cases, is_drawn  # noqa: E402  # the scripts are no package


SHAPES = ROOT / "examples" / "shapes" / "checkpoint"
DRAWING: dict[str, Any] = {"size": "64x64", "num_inference_steps": 24, "guidance_scale": 3.0}
REPLICA = "ray::ServeReplica:bagel:Replica"
T = TypeVar("T")


@dataclass
class Served:
    """`examples/serve_ray.py` in a process of its own, and a client of it."""

    process: subprocess.Popen[bytes]
    address: str
    client: OpenAI

    def replicas(self) -> set[int]:
        """The processes that answer."""
        return {child.pid for child in psutil.Process(self.process.pid).children(recursive=True) if _is_replica(child)}

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.address + path, timeout=60)

    def metrics(self) -> dict[str, list[float]]:
        """The samples of each metric that has no label but `replica` or `reason`, one for each value of that."""
        page = self.get("/metrics").text
        found: dict[str, list[float]] = {}
        for name, value in re.findall(r"^(\w+)(?:\{(?:replica|reason)=\"\w+\"\})? (\S+)$", page, flags=re.MULTILINE):
            found.setdefault(name, []).append(float(value))
        return found

    def total(self, name: str) -> float:
        return sum(self.metrics().get(name, ()))

    def say(self, *texts: str, **settings: Any) -> Any:
        """What is answered to the last of several texts, between which the model has spoken."""
        roles = ("user", "assistant")
        messages: Any = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
        settings = {"max_tokens": 24, "temperature": 0} | settings
        return self.client.chat.completions.create(model="shapes", messages=messages, **settings)

    def draw(self, case: DrawCase, seed: int) -> str:
        """What became of a request: `right`, `wrong`, the status it failed with, or `lost` if there was no answer."""
        try:
            drawn: Any = self.client.images.generate(prompt=case.prompt, extra_body=DRAWING | {"seed": seed})
        except APIStatusError as error:
            return str(error.status_code)
        except APIConnectionError:
            return "lost"
        picture = Image.open(io.BytesIO(base64.b64decode(drawn.data[0].b64_json)))
        return "right" if is_drawn(picture, case) else "wrong"


def _is_replica(process: psutil.Process) -> bool:
    try:
        # Behind it stands what the process is doing.
        return process.cmdline()[0].startswith(REPLICA)
    except (psutil.Error, IndexError):
        return False


def wait_for(true: Callable[[], T], seconds: float = 300) -> T:
    """
    The first value that is true.

    Raises:
        TimeoutError
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if value := true():
                return value
        except (httpx.HTTPError, APIConnectionError, APIStatusError):
            pass
        time.sleep(0.1)
    raise TimeoutError(f"Not come true in {seconds} s.")


@contextmanager
def served(log: IO[bytes], *settings: str, **environment: str) -> Iterator[Served]:
    """A cluster of its own, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ROOT / "examples" / "serve_ray.py"
    command = [
        sys.executable,
        str(script),
        f"model={SHAPES}",
        "name=shapes",
        "dtype=float32",
        "num_cpus=0.5",
        f"port={port}",
    ]
    own = {
        "PYTHONPATH": str(ROOT / "src"),
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen([*command, *settings], env=inherited | own | environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client:
        started = Served(process, address, client)
        try:
            wait_for(lambda: process.poll() is not None or started.get("/health").status_code == 200)
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} has ended.")
            yield started
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            process.wait(120)
            for child in psutil.wait_procs(children, 20)[1]:
                child.kill()


def load(server: Served, clients: int, seconds: float) -> tuple[Counter[str], float]:
    """What became of the requests of several clients that ask one after the other, and how many there were a second."""
    cases = draw_cases("draw_full", 200)
    start = time.monotonic()
    end = start + seconds

    def asks(client: int) -> Counter[str]:
        ended: Counter[str] = Counter()
        number = client
        while time.monotonic() < end:
            ended[server.draw(cases[number % len(cases)], number)] += 1
            number += clients
        return ended

    with ThreadPoolExecutor(clients) as pool:
        ended = sum(pool.map(asks, range(clients)), Counter())
    return ended, ended.total() / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="of each load")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="where Ray's own messages go")
    args = parser.parse_args()
    need_at_least(1, parser, args, "seconds", "clients")
    need_output(parser, "log", args.log)
    with open(args.log, "wb") as log:
        for replicas in (1, 2):
            with served(log, f"min_replicas={replicas}", f"max_replicas={replicas}") as server:
                load(server, args.clients, 3)
                ended, rate = load(server, args.clients, args.seconds)
                print(f"replicas: {replicas}, {rate:.2f} pictures/s, {dict(ended)}", flush=True)
                if replicas == 2:
                    with ThreadPoolExecutor(1) as pool:
                        loaded = pool.submit(load, server, args.clients, args.seconds)
                        time.sleep(args.seconds / 3)
                        os.kill(min(server.replicas()), signal.SIGKILL)
                        ended, _ = loaded.result()
                    again, lost = server.total("bagel_again_total"), server.total("bagel_lost_total")
                    print(f"one of 2 killed: {dict(ended)}, {again:.0f} made once more, {lost:.0f} failed")


if __name__ == "__main__":
    main()
