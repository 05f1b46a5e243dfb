"""`bagel serve` as a process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pytest

from bagel_cli.arguments import parse
from bagel_cli.files import CommandError
from bagel_cli.serving import bound_socket, settings_of
from bagel_server import ServerSettings
from tests.processes import ROOT

from .conftest import SHAPES, client_of


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server, and its URL."""
    command = [sys.executable, "-m", "diffusers_bagel", "serve", "--model", str(SHAPES), "--port", "0", *arguments]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = server.stdout.readline()
        assert "http://127.0.0.1:" in line, server.stderr.read()
        yield server, line.split()[-1].removesuffix("/v1")
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        server.stderr.close()


def test_sigterm_finishes_what_runs_then_leaves():
    with process("--name", "shapes", "--api-key", "key") as (server, url):
        client = client_of(url, api_key="key")
        assert client.models.list().data[0].id == "shapes"
        stream = client.images.generate(
            model="shapes", prompt="a red star on white", stream=True, extra_body={"num_inference_steps": 60}
        )
        events = [next(stream)]
        server.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        with pytest.raises(openai.APIConnectionError):
            while time.monotonic() < deadline:
                # One that comes in this instant is still answered.
                client_of(url, api_key="key").models.list()
        events += stream
        assert events[-1].type == "image_generation.completed"
        assert server.wait(timeout=20) == 0
        assert "Traceback" not in server.stderr.read()


def test_settings_are_those_of_the_command_line():
    options = parse(
        ["serve", "--model", "m", "--api-key", "k", "--allow-image-urls", "--raw-tokens", "--max-steps", "7", "--timeout", "9"]
    )
    assert settings_of(options) == ServerSettings(
        model="m", api_key="k", allow_image_urls=True, raw_tokens=True, max_steps=7, timeout=9.0
    )
    assert options.host == "127.0.0.1"
    assert settings_of(parse(["serve", "--model", "m"])) == ServerSettings(model="m")


@pytest.mark.parametrize("settings", [{"max_steps": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"api_key": ""}, {"api_key": "ü"}])
def test_settings_that_cannot_be_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        ServerSettings(**settings)


def test_an_address_that_is_taken_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(CommandError, match=f"--port {port}"):
            bound_socket(parse(["serve", "--port", port]))
