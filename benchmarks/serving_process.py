# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`bagel serve` in a process of its own, whose memory and metrics are read."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil


class ServerProcess:
    """
    A server of a checkpoint, within a `with`.

    Args:
        checkpoint (`str` or `Path`)
        clients (`int`): That ask at a time.
        cache_bytes (`int`): Of conversations that are kept.

    Attributes:
        samples (`list[tuple[float, int]]`): Seconds and bytes, see [`memory`].
    """

    def __init__(self, checkpoint: str | Path, clients: int, cache_bytes: int):
        options = ["--max-waiting", str(clients), "--max-requests", str(2 * clients)]
        options += ["--max-cache-bytes", str(cache_bytes), "--port", "0", "--name", "shapes"]
        self.command = [sys.executable, "-m", "diffusers_bagel", "serve", "--model", str(checkpoint), *options]
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> ServerProcess:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"http://\S+", line):
                self.url = found[0]
                return self
        raise RuntimeError(f"The server ended with code {self.process.wait()}.")

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def client(self, connections: int) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=2 * connections + 2, max_keepalive_connections=connections)
        return httpx.AsyncClient(base_url=self.url, timeout=600, limits=limits, trust_env=False)

    async def metrics(self, http: httpx.AsyncClient) -> str:
        return (await http.get(self.url.removesuffix("/v1") + "/metrics")).raise_for_status().text

    async def memory(self) -> None:
        """Note what the process holds in memory, every second until this is cancelled."""
        process, began = psutil.Process(self.process.pid), time.monotonic()
        while True:
            self.samples.append((time.monotonic() - began, process.memory_info().rss))
            await asyncio.sleep(1)


def total(metrics: str, name: str) -> float:
    """A number of Prometheus' text."""
    found = re.search(rf"^{name} (\S+)$", metrics, flags=re.MULTILINE)
    if found is None:
        raise KeyError(f"{name} is not among the metrics.")
    return float(found[1])
