"""Requests that no server of OpenAI's interfaces should answer, written from the interfaces alone: what, and which field is wrong."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import struct
import zlib
from collections.abc import Iterator
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

_OBJECTS = ({}, [], {"a": 1}, [1], [[]])
_NO_NUMBER = ("1", "", True, *_OBJECTS)
_NO_FLOAT = (*_NO_NUMBER, float("nan"), float("inf"), -float("inf"), HUGE_FLOAT)
_NO_INT = (*_NO_FLOAT, 1.5, -1, HUGE_INT)
_NO_STR = (1, 1.5, True, *_OBJECTS, HALF_LETTER)
_NO_BOOL = ("true", "", 1, 0, 1.5, *_OBJECTS)
_NO_MODEL = (*_NO_STR, "", "gpt-5", "../../etc/passwd", "a" * 100_000, "\0", "bagel ", "\u202e")
_NO_SIZE = (
    *_NO_STR,
    *(
        "",
        "big",
        "x",
        "0x0",
        "64",
        "64x",
        "x64",
        "64x64x64",
        "-64x64",
        "1e2x64",
        "64 x 64",
        "99999x99999",
        "64X",
        "64.0x64",
    ),
    *("٦٤x٦٤", "²x²", "9" * 5000 + "x64"),
)

# What any request may say about drawing.
_DRAWING: dict[str, tuple[Any, ...]] = {
    "n": (*_NO_INT, 0, 10**6),
    "seed": (*_NO_NUMBER, 1.5, float("nan"), HUGE_INT, 2**64),
    "size": _NO_SIZE,
    "height": (*_NO_INT, 0, 10**9, 7),
    "width": (*_NO_INT, 0, 10**9, 7),
    "num_inference_steps": (*_NO_INT, 0, 10**9),
    "guidance_scale": (*_NO_FLOAT, -1, HUGE_INT),
    "image_guidance_scale": (*_NO_FLOAT, -1, HUGE_INT),
    "cfg_interval": (
        "0",
        1,
        {},
        True,
        [1],
        ["a", "b"],
        [0, 1, 2],
        [2, 1],
        [float("nan"), 1],
        [HUGE_FLOAT, 1],
        [[], []],
    ),
    "cfg_renorm_type": (*_NO_STR, "none of them"),
    "cfg_renorm_min": (*_NO_FLOAT, -1, 2),
    "preset": (*_NO_STR, "", "none of them"),
    "think": _NO_BOOL,
    "stream": _NO_BOOL,
    "output_format": (*_NO_STR, "", "gif", "svg", "../png"),
    "output_compression": (*_NO_INT, 101),
    "user": _NO_STR[:-1],
}
_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (*_NO_FLOAT, -0.1, 2.1, 10**30, HUGE_INT),
    "top_p": (*_NO_FLOAT, -0.1, 1.1, HUGE_INT),
    "max_images": (*_NO_INT, 0, 10**9),
    "output": (*_NO_STR, "", "video"),
    "preview_every": (*_NO_INT[:-1], 0),
}
_NO_PART = (
    *(
        None,
        1,
        True,
        "a",
        [],
        {},
        {"type": None},
        {"type": 1},
        {"type": []},
        {"type": {}},
        {"type": "video"},
        {"text": "a"},
    ),
    *({"type": "text"}, *({"type": "text", "text": value} for value in (None, *_NO_STR))),
    *({"type": "image_url"}, *({"type": "image_url", "image_url": value} for value in (None, *_NO_STR, "", "a"))),
    *({"type": "image_url", "image_url": {"url": value}} for value in (None, *_NO_STR)),
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "file", "file": {"file_id": "f"}},
)
_NO_URL = (
    *("", " ", "a", "/etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd", "//127.0.0.1/a", "ftp://127.0.0.1/a"),
    *(
        "http://127.0.0.1/a",
        "HTTP://localhost/",
        "https://[::1]/",
        "http://169.254.169.254/latest",
        "gopher://127.0.0.1",
    ),
    *(
        "javascript:1",
        "data:",
        "data:,",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:text/html;base64,AAAA",
    ),
    *(
        "data:image/png;base64,****",
        "data:image/png;base64,AAA",
        "data:image/png,%89PNG",
        "data:image/svg+xml;base64,AAAA",
    ),
    *(
        "data:image/png;base64," + "A" * 100_000,
        "data:image/" + "a" * 10_000 + ";base64,AAAA",
        "http://" + "a" * 100_000,
    ),
    *(
        "http://[",
        "http://:99999/",
        "http://a:b@c:d/",
        "http://\0/",
        "http://2130706433/a",
        "http://0x7f000001/a",
        "http://127.1/a",
        "http://0.0.0.0/a",
        "http://[::]/a",
        "http://[::ffff:127.0.0.1]/a",
        "http://10.0.0.1/a",
        "http://192.168.0.1/a",
        "http://172.16.0.1:80/a",
        "http://[fe80::1]/a",
        "http://[fd00::1]/a",
        "http://100.64.0.1/a",
        "http://224.0.0.1/a",
        "http://127.0.0.1:22/a",
        "http://017700000001/a",
        "data:image/png;base64,é",
    ),
)
_NO_MESSAGES = (
    *(None, "hi", 1, True, {}, [], [None], [1], ["hi"], [[]], [{}], [{"role": "user"}], [{"content": "hi"}]),
    *(
        [{"role": role, "content": "hi"}]
        for role in (None, 1, [], {}, ["user"], "", "nobody", "USER", "user ", HALF_LETTER)
    ),
    *([{"role": "user", "content": content}] for content in (None, 1, True, {}, {"a": 1}, HALF_LETTER, float("nan"))),
    *([{"role": "user", "content": [part]}] for part in _NO_PART),
    [{"role": "user", "content": "hi", "surprise": 1}],
    [{"role": "user", "content": "hi", "": 1}],
    [{"role": "user", "content": "hi", HALF_LETTER: 1}],
    [{"role": "assistant", "content": "hi", "images": 1}, *said({"type": "text", "text": "hi"})],
    [{"role": "assistant", "content": "hi", "images": [1]}, *said({"type": "text", "text": "hi"})],
    [{"role": "assistant", "content": 1}, *said({"type": "text", "text": "hi"})],
    [{"role": "assistant", "content": "hi", "tool_calls": [1]}, *said({"type": "text", "text": "hi"})],
    [{"role": "assistant", "content": "hi", "reasoning_content": []}, *said({"type": "text", "text": "hi"})],
    [{"role": "user", "content": "hi"}] * 5000,
    said(*[{"type": "text", "text": "a" * 100_000}] * 11),
    said(*[shown(data_url(picture()))] * 100),
)
_CHAT_FIELDS: dict[str, tuple[Any, ...]] = {
    **_DRAWING,
    **_SAMPLING,
    "model": _NO_MODEL,
    "messages": _NO_MESSAGES,
    "max_tokens": (*_NO_INT, 0, 10**9),
    "max_completion_tokens": (*_NO_INT, 0, 10**9),
    "modalities": ("text", 1, True, {}, [1], ["audio"], [[]], ["text", None]),
    "stop": (1, True, {}, {"a": 1}, [1], [None], ["a"] * 5, ["a", 1]),
    "stream_options": (1, "a", True, [], {"include_usage": "yes"}, {"surprise": 1}, {"include_usage": True}),
    "reasoning_effort": (*_NO_STR, "", "hardest"),
    "presence_penalty": (1, "0", [], True, float("nan")),
    "frequency_penalty": (1, "0", {}, True, HUGE_FLOAT),
    "logit_bias": (1, "a", [1], {"1": 1}, {"1": float("nan")}),
    "logprobs": (True, 1, "false", []),
    "top_logprobs": (1, "0", -1),
    "response_format": (1, "text", [], {"type": "json_object"}, {"type": "json_schema", "json_schema": {}}),
    "tools": (1, "a", {}, [1], [{"type": "function", "function": {"name": "a"}}]),
    "tool_choice": (1, "required", {"type": "function"}),
    "metadata": (1, "a", [], {"a": 1}, {"a": None}),
    "audio": (1, {"voice": "a", "format": "wav"}),
    "surprise": (1, "a", [], {}),
}
_DRAW_FIELDS: dict[str, tuple[Any, ...]] = {
    **_DRAWING,
    "model": _NO_MODEL,
    "prompt": (None, "", *_NO_STR, "a" * 1_000_001),
    "response_format": (*_NO_STR, "url", ""),
    "quality": (*_NO_STR, "best"),
    "background": (*_NO_STR, "transparent"),
    "partial_images": (*_NO_INT, 4),
    "style": (1, "vivid"),
    "mask": (1, "a"),
    "surprise": (1, "a", [], {}),
}
_RESPOND_FIELDS: dict[str, tuple[Any, ...]] = {
    "model": _NO_MODEL,
    "input": (
        *(
            None,
            "",
            1,
            True,
            {},
            [],
            [None],
            [1],
            [[]],
            [{}],
            [{"role": "user"}],
            [{"type": []}],
            [{"type": "surprise"}],
        ),
        *([{"role": role, "content": "hi"}] for role in (None, 1, [], {}, "nobody", HALF_LETTER)),
        *([{"role": "user", "content": content}] for content in (None, 1, {}, [1], [None], [{}], HALF_LETTER)),
        *(
            [{"role": "user", "content": [{"type": "input_text", "text": text}]}]
            for text in (None, 1, [], {}, HALF_LETTER)
        ),
        *(
            [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]
            for url in (None, 1, [], {}, "", "a")
        ),
        [{"type": "image_generation_call", "id": 1, "result": 1}],
        [{"type": "reasoning", "summary": 1}, {"role": "user", "content": "hi"}],
        [{"role": "user", "content": "hi"}] * 5000,
    ),
    "instructions": (1, True, [], {}),
    "max_output_tokens": (*_NO_INT, 0, 10**9),
    "reasoning": (1, "low", [], {"effort": 1}, {"effort": "hardest"}, {"surprise": 1}),
    "tools": (
        1,
        "a",
        {},
        [1],
        [None],
        [{}],
        [{"type": 1}],
        [{"type": []}],
        [{"type": "web_search"}],
        [{"type": "image_generation", "size": 1}],
    ),
    "temperature": _SAMPLING["temperature"],
    "top_p": _SAMPLING["top_p"],
    "stream": _NO_BOOL,
    "text": (1, {"format": {"type": "json_object"}}, {"format": 1}),
    "previous_response_id": ("resp_1", 1, []),
    "store": ("a", 1, []),
    "truncation": ("auto", 1),
    "background": (True, "a"),
    "include": (1, "a", {}, [1]),
    "metadata": (1, [], {"a": 1}),
    "surprise": (1, "a", [], {}),
}


def wrong_fields() -> Iterator[Attack]:
    """Each field of each JSON interface with every wrong value."""
    for path, fields in ((CHAT, _CHAT_FIELDS), (DRAW, _DRAW_FIELDS), (RESPOND, _RESPOND_FIELDS)):
        for name, values in fields.items():
            # Of two fields for one thing the other would be named.
            base = {
                key: known
                for key, known in BASE[path].items()
                if (key, name) != ("max_tokens", "max_completion_tokens")
            }
            for place, value in enumerate(values):
                body = encoded(base | {name: value})
                # Half a letter is no JSON to some, who then know no fields.
                param = None if b"ud800" in body else name
                yield Attack(f"{path} {name} {place}: {str(value)[:60]}", path, body, param)
        for name in {CHAT: ("messages",), DRAW: ("prompt",), RESPOND: ("input",)}[path]:
            rest = {key: value for key, value in BASE[path].items() if key != name}
            yield Attack(f"{path} without {name}", path, encoded(rest), name)
    both = BASE[CHAT] | {"max_tokens": 1, "max_completion_tokens": 1}
    # More than the model has positions for.
    long = "a" * 5000
    yield Attack(
        "long messages", CHAT, encoded(BASE[CHAT] | {"messages": said({"type": "text", "text": long})}), "messages"
    )
    yield Attack("a long prompt", DRAW, encoded(BASE[DRAW] | {"prompt": long}), "prompt")
    yield Attack("a long input", RESPOND, encoded(BASE[RESPOND] | {"input": long}), "input")
    yield Attack("two lengths", CHAT, encoded(both), "max_tokens")
    yield Attack("two sizes", DRAW, encoded(BASE[DRAW] | {"size": "64x64", "height": 64}), "size")
    yield Attack("a field twice", DRAW, b'{"prompt": "a", "n": 1, "n": "a"}', "n")


def wrong_urls() -> Iterator[Attack]:
    """Images that are to come from elsewhere, or from nowhere."""
    for url in _NO_URL:
        yield Attack(f"chat {url[:40]!r}", CHAT, encoded(BASE[CHAT] | {"messages": said(shown(url))}), "messages")
        item = {"role": "user", "content": [{"type": "input_image", "image_url": url}]}
        yield Attack(f"responses {url[:40]!r}", RESPOND, encoded(BASE[RESPOND] | {"input": [item]}), "input")


def wrong_bodies() -> Iterator[Attack]:
    """What is no JSON object, or not in UTF-8, or said to be something else."""
    good = encoded(BASE[CHAT])
    deep = {"[": b"[" * 100_000, "{": b'{"a":' * 100_000, "closed": b"[" * 5000 + b"]" * 5000}
    bodies = {
        **{
            "empty": b"",
            "space": b" ",
            "null": b"null",
            "list": b"[]",
            "number": b"1",
            "text": b'"a"',
            "true": b"true",
        },
        **{
            "half": good[: len(good) // 2],
            "rest": good + b"}",
            "two": good + good,
            "quotes": good.replace(b'"', b"'"),
        },
        **{"utf-16": good.decode().encode("utf-16"), "utf-32": good.decode().encode("utf-32"), "zeros": b"\0" * 1000},
        **{"latin-1": good.replace(b'"hi"', b'"h\xe9"'), "overlong": good.replace(b'"hi"', b'"\xc0\xaf"')},
        **{"surrogate": good.replace(b'"hi"', b'"\xed\xa0\x80"'), "gzip": gzip.compress(good), "png": picture()},
        **{"control": good.replace(b'"hi"', b'"h\ni"'), "comment": b"/* */" + good, "comma": good[:-1] + b",}"},
        **{"digits": b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}", "minus": b'{"n": -}', "hex": b'{"n": 0x1}'},
        **{f"deep {name}": body for name, body in deep.items()},
        "large": b'{"messages": "' + b"a" * 3_000_000 + b'"}',
        "keys": encoded({f"k{index}": 1 for index in range(50_000)}),
    }
    for name, body in bodies.items():
        for path in (CHAT, DRAW, RESPOND):
            yield Attack(f"{path} {name}", path, body)
    nested: Any = "a"
    for _ in range(150):
        nested = [nested]
    yield Attack("deep content", CHAT, encoded(BASE[CHAT] | {"messages": nested}), "messages")
    yield Attack("deep surprise", CHAT, encoded(BASE[CHAT] | {"surprise": nested}), "surprise")
    for kind in (
        "text/plain",
        "",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/jsonx",
        "\xe9",
        "a" * 5000,
    ):
        for path in (CHAT, DRAW, RESPOND):
            yield Attack(f"{path} as {kind[:30]!r}", path, encoded(BASE[path]), headers={"content-type": kind})
    for coding in ("gzip", "deflate", "br", "zstd"):
        bomb = gzip.compress(b'{"prompt": "' + b"a" * 2_000_000 + b'"}')
        yield Attack(f"packed by {coding}", DRAW, bomb, headers=JSON | {"content-encoding": coding})


def wrong_forms(generator: random.Random) -> Iterator[Attack]:
    """Forms that are cut off, mixed up, too many, or none."""
    whole = form(*EDIT_BASE)
    for end in sorted(generator.sample(range(len(whole) - 8), 60)):
        yield Attack(f"cut off at {end}", EDIT, whole[:end], headers=dict(FORM))
    image, prompt = EDIT_BASE[:2]
    forms = {
        "no image": (form(prompt), "image"),
        "no prompt": (form(image), "prompt"),
        "no picture": (form(("image", b"hello"), prompt), "image"),
        "an empty picture": (form(("image", b""), prompt), "image"),
        "a text as the picture": (form(("image", "hello"), prompt), "image"),
        "a prompt as a file": (form(image, ("prompt", b"hello")), "prompt"),
        "an empty prompt": (form(image, ("prompt", "")), "prompt"),
        "two prompts": (form(image, prompt, prompt), "prompt"),
        "a mask": (form(image, prompt, ("mask", picture())), "mask"),
        "a mask as a text": (form(image, prompt, ("mask", "a")), "mask"),
        "too many pictures": (form(*[image] * 50, prompt), None),
        "too many fields": (form(image, prompt, *[(f"f{index}", "a") for index in range(2000)]), None),
        "another field": (form(image, prompt, ("surprise", "a")), "surprise"),
        "another file": (form(image, prompt, ("surprise", picture())), "surprise"),
        "a file without a name": (form(image, prompt, ("", picture())), None),
        "a text without a name": (form(image, prompt, ("", "a")), None),
        "a long field": (form(image, ("prompt", "a" * 1_500_000)), None),
        "a name with line ends": (form(image, prompt, ("n\r\nX: y", "1")), None),
        "a name without end": (whole.replace(b'name="prompt"', b'name="prompt'), None),
        "no name": (whole.replace(b'; name="prompt"', b""), None),
        "no disposition": (whole.replace(b"Content-Disposition: form-data; ", b""), None),
        "other line ends": (whole.replace(b"\r\n", b"\n"), None),
        "another boundary": (form(*EDIT_BASE, boundary="other"), None),
        "no form": (encoded(BASE[DRAW]), None),
        "nothing": (b"", None),
        "an end alone": (f"--{BOUNDARY}--\r\n".encode(), None),
        "zeros": (b"\0" * 5000, None),
    }
    for name, (body, param) in forms.items():
        yield Attack(name, EDIT, body, param, headers=dict(FORM))
    for name, values in _DRAWING.items():
        texts = {value for value in values if isinstance(value, str) and value and "@" not in value}
        # In a form numbers are texts, and so are words that are true.
        texts -= {"1", "true"}
        for value in sorted({*texts, "[]", "a b"} - ({"a b", "[]"} if name == "user" else set())):
            yield Attack(f"{name} {value[:20]}", EDIT, form(*EDIT_BASE[:2], (name, value)), name, headers=dict(FORM))
    for name in ("n", "height", "num_inference_steps", "guidance_scale", "output_compression", "partial_images"):
        for value in ("-1", "nan", "inf", "1e999", "0x10", "9" * 400, "9" * 5000, "½"):
            yield Attack(f"{name} {value[:9]}", EDIT, form(*EDIT_BASE[:2], (name, value)), name, headers=dict(FORM))
    for kind in ("", "multipart/form-data", "multipart/form-data; boundary=", "multipart/mixed; boundary=----fuzz"):
        yield Attack(f"as {kind!r}", EDIT, whole, headers={"content-type": kind})
    for boundary in ("a" * 5000, '"', "é", "----fuz", '"----fuzz', "\t"):
        kind = f"multipart/form-data; boundary={boundary}"
        yield Attack(f"boundary {boundary[:9]!r}", EDIT, whole, headers={"content-type": kind})
    yield Attack("as JSON", EDIT, encoded(BASE[DRAW]), headers=dict(JSON))


def _png(width: int, height: int, *chunks: tuple[bytes, bytes], colour: int = 2, depth: int = 8) -> bytes:
    """A PNG that says what it likes."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pieces = [(b"IHDR", head), *chunks, (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in pieces
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that become large, and files of formats that run programs or were never meant."""
    dark = zlib.compress(b"\0" * 8_000_000, 9)
    yield "a PNG of 60,000 px", _png(60_000, 60_000, (b"IDAT", dark))
    yield "a PNG of 2 Gpx", _png(2**31 - 1, 2**31 - 1, (b"IDAT", dark))
    yield "a PNG of no pixel", _png(0, 0, (b"IDAT", dark))
    yield "a PNG in one colour", _png(30_000, 2_000, (b"IDAT", dark), colour=0, depth=1)
    yield "a PNG without data", _png(64, 64)
    yield (
        "a PNG with a long text",
        _png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(b"a" * 80_000_000, 9)), (b"IDAT", dark)),
    )
    yield "a PNG of another depth", _png(8, 8, (b"IDAT", dark), depth=3)
    yield (
        "a JPEG of 65,535 px",
        picture("JPEG").replace(struct.pack(">HH", 16, 24), struct.pack(">HH", 65_535, 65_535)),
    )
    yield "a GIF of 65,535 px", picture("GIF").replace(struct.pack("<HH", 24, 16), struct.pack("<HH", 65_535, 65_535))
    yield (
        "a BMP of 2 Gpx",
        picture("BMP").replace(struct.pack("<ii", 24, 16), struct.pack("<ii", 2**31 - 1, 2**31 - 1)),
    )
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(/etc/passwd) (r) file\n%%EOF\n"
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "PDF", b"%PDF-1.7\n1 0 obj<<>>endobj\n"
    yield "HTML", b"<html><script>1</script></html>"
    yield "a pickle", b"\x80\x04cos\nsystem\n."
    yield "zeros", b"\0" * 100_000


def wrong_images() -> Iterator[Attack]:
    """Bombs and what is no picture, by each way that a picture comes in."""
    for name, content in bombs():
        yield Attack(f"edit {name}", EDIT, form(("image", content), *EDIT_BASE[1:]), "image", headers=dict(FORM))
        yield Attack(
            f"chat {name}", CHAT, encoded(BASE[CHAT] | {"messages": said(shown(data_url(content)))}), "messages"
        )


def broken_images(generator: random.Random, count: int) -> Iterator[Attack]:
    """Pictures with a few other bytes, some of which can still be read."""
    for index in range(count):
        kind = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "ICO", "PPM", "TGA")[index % 9]
        content = bytearray(picture(kind))
        for _ in range(generator.choice((1, 3, 30))):
            content[generator.randrange(len(content))] = generator.randrange(256)
        if generator.random() < 0.3:
            del content[generator.randrange(len(content)) :]
        messages = said(shown(data_url(bytes(content), kind.lower())))
        yield Attack(f"{kind} {index}", CHAT, encoded(BASE[CHAT] | {"messages": messages}), "messages", may_pass=True)


def broken_bodies(generator: random.Random, count: int) -> Iterator[Attack]:
    """Requests with a few other bytes, some of which say the same as before."""
    for index in range(count):
        path = (CHAT, DRAW, RESPOND, EDIT)[index % 4]
        body = bytearray(form(*EDIT_BASE) if path == EDIT else encoded(BASE[path]))
        for _ in range(generator.choice((1, 2, 8))):
            body[generator.randrange(len(body))] = generator.choice(b'\0\x7f\xff{}[]",:-.0919eEtrunl\\ \r\n')
        yield Attack(f"{path} {index}", path, bytes(body), headers=dict(FORM if path == EDIT else JSON), may_pass=True)


def wrong_places() -> Iterator[Attack]:
    """Paths and methods that are none."""
    paths = (
        *(
            "/v1",
            "/v1/",
            "/v2/models",
            "//v1/models",
            "/v1//models",
            "/v1/models/",
            "/v1/models/gpt-5",
            "/v1/models/bagel/",
        ),
        *(
            "/v1/models/../../etc/passwd",
            "/v1/%2e%2e/%2e%2e/etc/passwd",
            "/v1/models/%00",
            "/v1/models/%ff",
            "/v1/models/%",
        ),
        *(
            "/v1/models/%F0%9F%A5%AF",
            "/v1/models/" + "a" * 20_000,
            "/v1/chat/completions/",
            "/v1/chat",
            "/v1/images/variations",
        ),
        *(
            "/v1/embeddings",
            "/v1/audio/speech",
            "/v1/files",
            "/docs",
            "/openapi.json",
            "/static/../app.py",
            "/.env",
            "/v1/responses/resp_1",
        ),
        *("/V1/MODELS", "/v1/models;a=b", "/v1/chat/completions%0d%0aX:%20y"),
    )
    for path in paths:
        yield Attack(f"GET {path[:50]}", path, method="GET")
    for path in POSTS:
        for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "SURPRISE"):
            yield Attack(f"{method} {path}", path, encoded(BASE[CHAT]) if method != "GET" else b"", method=method)
    for path in ("/v1/models", "/health", "/metrics"):
        for method in ("POST", "DELETE", "PUT"):
            yield Attack(f"{method} {path}", path, b"{}", method=method)


def wrong_keys() -> Iterator[Attack]:
    """Whoever has no key, or another; with requests that would be right."""
    keys = (
        *(
            None,
            "",
            " ",
            KEY,
            "Bearer",
            "Bearer ",
            f"Basic {KEY}",
            f"Bearer{KEY}",
            f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}",
        ),
        *(
            f"Bearer x{KEY}",
            f"Bearer {KEY.upper()}",
            f"Bearer {KEY},{KEY}",
            f"Bearer {KEY} {KEY}",
            "Bearer " + "a" * 10_000,
        ),
        *("Bearer \xe9\xff", f"Token {KEY}", f'Bearer "{KEY}"', f"Bearer Bearer {KEY}", "Basic Og=="),
    )
    for path in POSTS:
        for key in keys:
            kind = FORM if path == EDIT else JSON
            headers = kind | {"authorization": key or ""} if key is not None else dict(kind)
            body = form(*EDIT_BASE) if path == EDIT else encoded(BASE[path])
            yield Attack(f"{path} {str(key)[:30]!r}", path, body, headers=headers)
    yield Attack("a key in the query", f"/v1/models?api_key={KEY}&key={KEY}", method="GET", headers={})
    yield Attack(
        "a key in a cookie", "/v1/models", method="GET", headers={"cookie": f"api_key={KEY}", "x-api-key": KEY}
    )
    yield Attack("a path around the key", "/health/../v1/models", method="GET", headers={})
