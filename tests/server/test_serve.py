"""`bagel serve` as a process."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import openai
import pytest
import torch

from bagel_cli import main
from bagel_cli.arguments import parse
from bagel_cli.files import CommandError
from bagel_cli.serving import bound_socket, settings_of
from bagel_server import ServerSettings
from tests.processes import CONTEXT

from .conftest import SHAPES, client_of


@contextmanager
def process(folder: Path, *arguments: str) -> Iterator[tuple[BaseProcess, str]]:
    """A server, and its URL."""
    output = folder / "output"
    server = CONTEXT.Process(target=become_server, args=(output, ["--model", str(SHAPES), "--port", "0", *arguments]))
    server.start()
    try:
        while not (found := re.search(r"http://\S+(?=/v1\n)", output.read_text() if output.exists() else "")):
            assert server.is_alive(), output.read_text()
            time.sleep(0.05)
        yield server, found[0]
    finally:
        server.kill()
        server.join()


def become_server(output: Path, arguments: list[str]) -> None:
    """Go on as `bagel serve`, writing to a file."""
    with open(output, "wb") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    gc.freeze()
    torch.set_num_threads(1)
    sys.exit(main(["serve", *arguments]))


def test_sigterm_finishes_what_runs_then_leaves(tmp_path):
    with process(tmp_path, "--name", "shapes", "--api-key", "key") as (server, url):
        client = client_of(url, api_key="key")
        assert client.models.list().data[0].id == "shapes"
        stream = client.images.generate(
            model="shapes", prompt="a red star on white", stream=True, extra_body={"num_inference_steps": 60}
        )
        events = [next(stream)]
        os.kill(server.pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        with pytest.raises(openai.APIConnectionError):
            while time.monotonic() < deadline:
                # One that comes in this instant is still answered.
                client_of(url, api_key="key").models.list()
        events += stream
        assert events[-1].type == "image_generation.completed"
        server.join(20)
        assert server.exitcode == 0
        assert "Traceback" not in (tmp_path / "output").read_text()


def test_settings_are_those_of_the_command_line():
    options = parse(
        [
            "serve",
            "--model",
            "m",
            "--api-key",
            "k",
            "--allow-image-urls",
            "--raw-tokens",
            "--max-steps",
            "7",
            "--timeout",
            "9",
        ]
    )
    assert settings_of(options) == ServerSettings(
        model="m", api_key="k", allow_image_urls=True, raw_tokens=True, max_steps=7, timeout=9.0
    )
    assert options.host == "127.0.0.1"
    assert settings_of(parse(["serve", "--model", "m"])) == ServerSettings(model="m")


@pytest.mark.parametrize(
    "settings", [{"max_steps": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"api_key": ""}, {"api_key": "ü"}]
)
def test_settings_that_cannot_be_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        ServerSettings(**settings)


def test_an_address_that_is_taken_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(CommandError, match=f"--port {port}"):
            bound_socket(parse(["serve", "--port", port]))
