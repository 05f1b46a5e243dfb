"""Requests that no server of OpenAI's interfaces should answer, written from the interfaces alone: what, and which field is wrong."""

from __future__ import annotations

import gzip
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from tests.server.attack import (
    BASE,
    BOUNDARY,
    CHAT,
    DRAW,
    EDIT,
    EDIT_BASE,
    FORM,
    JSON,
    KEY,
    POSTS,
    RESPOND,
    Attack,
    data_url,
    encoded,
    form,
    picture,
    said,
    shown,
)
from tests.server.wrong_fields import DRAWING_FIELDS


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
    for name, values in DRAWING_FIELDS.items():
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
