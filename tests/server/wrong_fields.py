"""Every field of each interface, and what is no value of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.server.attack import (
    BASE,
    CHAT,
    DRAW,
    HALF_LETTER,
    HUGE_FLOAT,
    HUGE_INT,
    RESPOND,
    Attack,
    data_url,
    encoded,
    picture,
    said,
    shown,
)


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
DRAWING_FIELDS: dict[str, tuple[Any, ...]] = {
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
    "guidance_tolerance": (*_NO_FLOAT, -1, 2),
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
    **DRAWING_FIELDS,
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
    **DRAWING_FIELDS,
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
