"""How things are broken: JSON documents, bytes, safetensors files, and values."""

from __future__ import annotations

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch


NUMBERS = [0, 1, -1, 2, 3, 7, 17, 64, 1000, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-30, 1e30, float("nan"), float("inf")]
ODD_VALUES: list[Any] = [
    *(None, True, False, "", "x", "nan", "0", "../../x", "a" * 5000, "\ud83d\ude00", "%s{}", "(a+)+$"),
    *([], [0], [None], ["x"], [[]], {}, {"a": 1}, {"": None}),
    *NUMBERS,
]


def mutate_json(document: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy of a document with one thing changed somewhere in it, and what that was."""
    document = copy.deepcopy(document)
    place, owner = "", document
    while isinstance(owner, (dict, list)) and owner:
        keys = list(owner) if isinstance(owner, dict) else list(range(min(len(owner), 50)))
        key = rng.choice(keys)
        place += f".{str(key)[:30]}"
        if isinstance(owner[key], (dict, list)) and owner[key] and rng.random() < 0.8:
            owner = owner[key]
            continue
        return document, _mutate_item(owner, key, place, rng)
    return rng.choice(ODD_VALUES), "all of it"


def _mutate_item(owner: Any, key: Any, place: str, rng: random.Random) -> str:
    value = owner[key]
    change = rng.choice(["replace", "replace", "replace", "delete", "rename", "near", "swap"])
    if change == "delete":
        del owner[key]
        return f"{place} deleted"
    if change == "rename" and isinstance(owner, dict):
        name = rng.choice([key + "s", key.upper(), key[:-1], "", "_" + key])
        owner[name] = owner.pop(key)
        return f"{place} renamed to {name!r}"
    if change == "near" and isinstance(value, (int, float)) and not isinstance(value, bool):
        owner[key] = rng.choice([value + 1, value - 1, value * 2, -value, value // 2, float(value), str(value)])
        return f"{place} changed from {value!r} to {owner[key]!r}"
    if change == "swap" and len(owner) > 1:
        other = rng.choice(list(owner) if isinstance(owner, dict) else list(range(len(owner))))
        owner[key], owner[other] = owner[other], owner[key]
        return f"{place} swapped with {other!r}"
    owner[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return f"{place} changed from {str(value)[:40]!r} to {str(owner[key])[:40]!r}"


def mutate_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Bytes of a file that was cut, filled with other bytes, or lengthened."""
    data = bytearray(content)
    change = rng.choice(["cut", "flip", "zero", "insert", "delete", "repeat", "empty"])
    start = rng.randrange(len(data))
    length = min(len(data) - start, rng.choice([1, 2, 8, 100, 5000]))
    if change == "cut":
        del data[start:]
    elif change == "flip":
        for place in range(start, start + length):
            data[place] ^= 1 << rng.randrange(8)
    elif change == "zero":
        data[start : start + length] = bytes(length)
    elif change == "insert":
        data[start:start] = rng.randbytes(length)
    elif change == "delete":
        del data[start : start + length]
    elif change == "repeat":
        data += data[start : start + length]
    else:
        data.clear()
    return bytes(data), f"{change} {length} of {len(content)} bytes at {start}"


def mutate_file(file: Path, rng: random.Random) -> str:
    """Break a file in place: its JSON if it is one, the header of its tensors, or its bytes."""
    content = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.8:
        document, what = mutate_json(json.loads(content), rng)
        changed = json.dumps(document).encode()
    elif file.suffix == ".safetensors" and rng.random() < 0.8:
        changed, what = mutate_header(content, rng)
    else:
        changed, what = mutate_bytes(content, rng)
    # Other folders share the file.
    file.unlink()
    file.write_bytes(changed)
    return f"{file.name}: {what}"


def mutate_header(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file whose header says something else about its tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    tensors = [name for name in header if name != "__metadata__"]
    name = rng.choice(tensors)
    entry = header[name]
    change = rng.choice(["rename", "remove", "dtype", "shape", "offsets", "json", "length", "metadata"])
    if change == "rename":
        new = rng.choice([name + "x", name.upper(), name.replace(".", "_"), rng.choice(tensors), name[6:]])
        header[new] = header.pop(name)
    elif change == "remove":
        del header[name]
    elif change == "dtype":
        entry["dtype"] = rng.choice(["I32", "F32", "BF16", "F16", "I64", "BOOL", "F8_E4M3", "X", None])
    elif change == "shape":
        entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [], [2**40], [-1], "x", [1e3], None])
    elif change == "offsets":
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice([[0, 4], [end, start], [start, end + 4], [-4, end], [2**62, 2**63], "x"])
    elif change == "json":
        header, change = mutate_json(header, rng)
    elif change == "metadata":
        header["__metadata__"] = rng.choice([{"format": "tf"}, {"format": 1}, "x", {}, {"a": "b" * 1000}])
    text = json.dumps(header).encode()
    stated = rng.choice([0, 2**40, 2**63, len(text) + 1, len(text) - 1]) if change == "length" else len(text)
    return struct.pack("<Q", stated) + text + content[8 + length :], f"header, {name}: {change}"


def odd_value(rng: random.Random) -> Any:
    """Anything that a caller might pass for something."""
    return copy.deepcopy(
        rng.choice(
            [
                *ODD_VALUES,
                np.float32(0.5),
                np.int64(3),
                np.zeros((4, 4)),
                torch.zeros(()),
                torch.ones(2, 3),
                torch.tensor(float("nan")),
                b"x",
                (1, 2),
                object(),
                Path("x.png"),
            ]
        )
    )
