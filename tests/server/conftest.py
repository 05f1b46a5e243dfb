"""A real server in a thread, and the official client."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import uvicorn
from PIL import Image

from bagel_server import Engine, ServerSettings, create_app
from diffusers_bagel import BagelPipeline, BagelSession
from tests.conftest import golden_image
from tests.diffusers_bagel.conftest import forwards, own_pipe, pipe  # noqa: F401  # fixtures
from tests.processes import ROOT


MODEL = "bagel-tiny"
SMALL = {"height": 48, "width": 64, "num_inference_steps": 3}
SHAPES = ROOT / "examples" / "shapes" / "checkpoint"


@contextmanager
def served(engine: Engine, **settings: Any) -> Iterator[str]:
    """The URL of a server on a free port."""
    app = create_app(engine, ServerSettings(**({"model": MODEL} | settings)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def client_of(url: str, **settings: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", **({"api_key": "none", "max_retries": 0} | settings))


@pytest.fixture(scope="session")
def engine(pipe) -> Iterator[Engine]:  # noqa: F811
    engine = Engine(pipe)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with served(engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return client_of(url)


@pytest.fixture(scope="session")
def shapes() -> BagelPipeline:
    """A model that was trained, see docs/shapes.md."""
    trained = BagelPipeline.from_pretrained(SHAPES)
    trained.set_progress_bar_config(disable=True)
    return trained


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def data_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def picture(content: str) -> Image.Image:
    """What an answer holds, as base64 or a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(content.rpartition(",")[2])))


def user(*parts: Any) -> dict[str, Any]:
    """A message of the user, of texts and images."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
    return {"role": "user", "content": content}


def wide() -> Image.Image:
    return golden_image("wide").convert("RGB")


def session_of(pipe: BagelPipeline, *messages: dict[str, Any]) -> BagelSession:  # noqa: F811
    """A session that took over messages as a server does."""
    session = BagelSession(pipe)
    if messages:
        session.recall(messages, sanitize_control_tokens=True)
    return session
