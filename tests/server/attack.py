"""Requests to a server as bytes, right ones and such as nobody should answer."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image


KEY = "sk-fuzz"
MODEL = "bagel"
CHAT, DRAW, EDIT, RESPOND = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits", "/v1/responses"
POSTS = (CHAT, DRAW, EDIT, RESPOND)
JSON = {"content-type": "application/json"}
BOUNDARY = "----fuzz"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
# Written into JSON as they are, which no library does.
HUGE_FLOAT, HUGE_INT, HALF_LETTER = "@1e999@", "@" + "9" * 400 + "@", "@half@"


@dataclass(frozen=True)
class Attack:
    """
    A request that must be refused.

    Attributes:
        name (`str`)
        path (`str`)
        body (`bytes`)
        param (`str`, *optional*): The field that must be named; of a list or an object, any place in it.
        method (`str`)
        headers (`dict`)
        may_pass (`bool`): Whether it may also be right, such as a broken image that can still be read.
    """

    name: str
    path: str
    body: bytes = b""
    param: str | None = None
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    may_pass: bool = False


def encoded(content: Any) -> bytes:
    """As JSON, with numbers that JSON has not."""
    text = json.dumps(content).replace('"@half@"', '"\\ud800"')
    return text.replace(f'"{HUGE_FLOAT}"', "1e999").replace(f'"{HUGE_INT}"', HUGE_INT.strip("@")).encode()


def said(*parts: Any) -> list[dict[str, Any]]:
    """Messages of one by the user."""
    return [{"role": "user", "content": list(parts)}]


def picture(kind: str = "PNG", size: tuple[int, int] = (24, 16)) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def shown(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def form(*parts: tuple[str, bytes | str], boundary: str = BOUNDARY) -> bytes:
    """A form of fields, and of files where the content is bytes."""
    pieces = []
    for name, content in parts:
        is_file = isinstance(content, bytes)
        head = f'Content-Disposition: form-data; name="{name}"' + '; filename="a.png"' * is_file
        head += "\r\nContent-Type: image/png" * is_file
        data = content if isinstance(content, bytes) else content.encode()
        pieces.append(f"--{boundary}\r\n{head}\r\n\r\n".encode() + data + b"\r\n")
    return b"".join(pieces) + f"--{boundary}--\r\n".encode()


# Short answers, should one be given.
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": said({"type": "text", "text": "hi"}), "max_tokens": 1, "modalities": ["text"]},
    DRAW: {"model": MODEL, "prompt": "a", "num_inference_steps": 1},
    RESPOND: {"model": MODEL, "input": "hi", "max_output_tokens": 16, "output": "text"},
}
EDIT_BASE = (("image", picture()), ("prompt", "a"), ("num_inference_steps", "1"))
