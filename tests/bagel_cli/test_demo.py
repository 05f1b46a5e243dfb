"""`bagel demo`: a page that nobody else sees."""

from __future__ import annotations

import socket

import httpx
import pytest

from bagel_cli import main
from bagel_demo import BagelPage


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_the_page_is_there_on_this_machine_alone(saved, port, monkeypatch, capsys):
    def look(page: BagelPage) -> None:
        assert "BAGEL" in httpx.get(f"http://127.0.0.1:{port}").text
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)
        page.close()

    monkeypatch.setattr(BagelPage, "block_thread", look)
    assert main(["demo", "--model", saved, "--port", str(port)]) == 0
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().out


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["demo", "--model", str(tmp_path), "--port", str(port)]) == 2
    assert f"--port {port}: nobody can listen there" in capsys.readouterr().err
