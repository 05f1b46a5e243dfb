# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Sessions in folders: what was said, its pictures, and their latents. What the model made of them is computed again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from transformers_bagel.checkpoints import check_folder, open_tensors, read_json
from transformers_bagel.destinations import destination
from transformers_bagel.errors import shown
from transformers_bagel.image_processing_bagel import to_rgb
from transformers_bagel.segments import EncodedSegment, Segment, check_conversation, content_parts

from .answering import encode_image
from .conversation import Conversation, SaidImage, SaidText, Update
from .inputs import check_images_kwargs
from .protocols import PROTOCOLS, InterleaveProtocol


if TYPE_CHECKING:
    from .session import BagelSession

VERSION = 1
SESSION_FILE = "session.json"
# Of a picture and of its latents, by its place in the conversation and by what it holds: no file is ever changed.
_NAME = r"(picture-\d{4,}-[0-9a-f]{16}\.png|latents-\d{4,}-[0-9a-f]{16}\.safetensors)"
_UNFINISHED = ".unfinished"
_REMEDY = "Take the folder from a copy, or begin a new session."
# What is saved takes away the files of what was there: never two at a time.
_saving = threading.Lock()


def save_session(session: BagelSession, folder: str | os.PathLike) -> None:
    """
    Write a session that nobody changes meanwhile. Until all is written, the folder holds what it held.

    Raises:
        OSError: if the folder is a file, or cannot be written to.
    """
    place = destination(folder, "`folder`")
    images = [said for turn in session._said.turns for said in turn if isinstance(said, SaidImage)]
    names, files = list[dict[str, str]](), dict[str, Callable[[Path], Any]]()
    for number, said in enumerate(images, 1):
        picture, latents = said.vae.segment.content, said.vae.latents
        names.append({"picture": f"picture-{number:04}-{_digest(picture)}.png"})
        files[names[-1]["picture"]] = partial(_save_picture, picture)
        # Without what draws there are none.
        if latents is not None:
            latents = latents.cpu().contiguous()
            names[-1]["latents"] = f"latents-{number:04}-{_digest(latents)}.safetensors"
            files[names[-1]["latents"]] = partial(save_file, {"latents": latents})
    description = json.dumps(_described(session, names), indent=1, ensure_ascii=False)
    with _saving:
        is_new, added = not place.exists(), []
        place.mkdir(parents=True, exist_ok=True)
        try:
            for name, write in files.items():
                file = place / name
                if not file.exists():
                    added.append(file)
                elif _is_whole(file):
                    continue
                _write(file, write)
            _write(place / SESSION_FILE, lambda file: file.write_text(description, encoding="utf-8"))
        except BaseException:
            for file in added:
                file.unlink(missing_ok=True)
            if is_new:
                place.rmdir()
            raise
        for file in place.iterdir():
            if re.fullmatch(rf"{_NAME}|\..*{_UNFINISHED}", file.name) and file.name not in files:
                file.unlink()


def _save_picture(picture: Image.Image, file: Path) -> None:
    # Without what its own file said beside the pixels, such as where it was taken.
    Image.fromarray(np.asarray(picture)).save(file, "PNG")


def _write(file: Path, write: Callable[[Path], Any]) -> None:
    """A whole file in the place of what was there, or nothing."""
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex}{_UNFINISHED}")
    try:
        write(beside)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def _described(session: BagelSession, names: Sequence[dict[str, str]]) -> dict[str, Any]:
    """What a session's file says, with the names of the files of each image."""
    pictures, files = (own["picture"] for own in names), iter(names)
    messages = [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(pictures)}
                if part["type"] == "image"
                else {"type": "text", "text": part["text"]}
                for part in content_parts(message)
            ],
        }
        for message in session.messages
    ]
    turns = [
        [_text_record(said) if isinstance(said, SaidText) else _image_record(said, next(files)) for said in turn]
        for turn in session._said.turns
    ]
    return {"version": VERSION, "protocol": _protocol_record(session.protocol), "messages": messages, "turns": turns}


def _text_record(said: SaidText) -> dict[str, Any]:
    record = {"text": said.segment.segment.content, "update": vars(said.update), "is_written": said.is_written}
    if said.segment.segment.sanitize_control_tokens:
        record["sanitize_control_tokens"] = True
    return record if said.untagged is None else record | {"untagged": said.untagged.segment.content}


def _image_record(said: SaidImage, files: dict[str, str]) -> dict[str, Any]:
    how = {name: getattr(said, name) for name in ("encoders", "is_given", "is_resized")}
    if said.images_kwargs:
        how["images_kwargs"] = said.images_kwargs
    return files | {"grids": [said.vae.grid, said.vit.grid], "update": vars(said.update)} | how


def _protocol_record(protocol: InterleaveProtocol) -> dict[str, Any]:
    """A protocol as its difference from the one of its name, or none if JSON cannot hold that."""
    known = protocol.name in PROTOCOLS
    base = PROTOCOLS[protocol.name] if known else InterleaveProtocol(protocol.name)
    own, others = ({item.name: getattr(each, item.name) for item in fields(each)} for each in (protocol, base))
    changes = {name: value for name, value in own.items() if value is not others[name]}
    try:
        changes = json.loads(json.dumps(changes, default=_plain))
    except (TypeError, ValueError):
        return {"name": protocol.name, "known": known, "changes": None}
    return {"name": protocol.name, "known": known, "changes": changes}


def _plain(value: Any) -> dict[str, Any]:
    if isinstance(value, Update):
        return vars(value)
    raise TypeError(f"{shown(value)} is not for JSON.")


def read_description(folder: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """
    The folder of a session, and what its file says. The other files are there, but none of them was read.

    Raises:
        OSError: if a file is missing.
        ValueError: if the file describes no session, or one of another version.
    """
    place = Path(os.path.expanduser(folder))
    file = place / SESSION_FILE
    if not file.is_file():
        raise FileNotFoundError(f"`folder`: '{file}' is missing. Name a folder to which a session was saved.")
    check_folder(place)
    try:
        description = read_json(file)
    except ValueError as error:
        raise ValueError(f"'{file}' cannot be read as JSON ({error.__cause__ or error}). {_REMEDY}") from error
    if (version := description.get("version")) != VERSION:
        raise ValueError(
            f"`version` in '{file}' is {shown(version)}, and this package reads {VERSION}. Restore the session with the "
            "package that saved it."
        )
    try:
        names = _checked_names(description["messages"], description["turns"])
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise _no_session(file, error) from error
    for name in names:
        if not (place / name).is_file():
            raise FileNotFoundError(f"'{place / name}' is missing, and the session needs it. {_REMEDY}")
    return place, description


def _checked_names(messages: list[Any], turns: list[Any]) -> list[str]:
    """The names of all files of images, which messages and turns have in common."""
    if messages:
        check_conversation(messages, "messages")
    pictures = [part["image"] for message in messages for part in content_parts(message) if part["type"] == "image"]
    records = _image_records(turns)
    if pictures != [record["picture"] for record in records]:
        raise ValueError("`messages` and `turns` hold different pictures")
    if len(turns) != sum(message["role"] == "user" for message in messages):
        raise ValueError("`turns` are not as many as messages of the user")
    names = [record[kind] for record in records for kind in ("picture", "latents") if kind in record]
    if wrong := [name for name in names if not re.fullmatch(_NAME, name)]:
        raise ValueError(f"{shown(wrong[0])} is no file of a session")
    return names


def _image_records(turns: list[Any]) -> list[dict[str, Any]]:
    return [record for turn in turns for record in turn if "picture" in record]


def _no_session(file: Path, error: Exception) -> ValueError:
    """What is raised for a file that is JSON, and no session."""
    missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return ValueError(f"'{file}' describes no session: {missing.rstrip('.')}. {_REMEDY}")


def saved_protocol(place: Path, description: dict[str, Any]) -> InterleaveProtocol:
    """
    The protocol of a session.

    Raises:
        ValueError: if it must be passed, because no file could hold it.
    """
    try:
        record = description["protocol"]
        name, changes = record["name"], record["changes"]
        base = PROTOCOLS.get(name) if record["known"] else InterleaveProtocol(name)
        if changes is None or base is None:
            what = "settings that no file can hold" if changes is None else "a name that this package does not know"
            raise ValueError(
                f"`protocol`: the session in '{place}' goes by {shown(name)}, a protocol with {what}. Pass it, too: "
                "`BagelSession.from_pretrained(folder, pipe, protocol=...)`."
            )
        return base.with_changes(**{key: _field(value, getattr(base, key)) for key, value in changes.items()})
    except (LookupError, TypeError, AttributeError) as error:
        raise _no_session(place / SESSION_FILE, error) from error


def _field(value: Any, like: Any) -> Any:
    """A field of a protocol, from JSON."""
    if isinstance(like, Update):
        return Update(**value)
    return tuple(value) if isinstance(value, list) else value


def restored(
    place: Path, description: dict[str, Any], pipe: Any
) -> tuple[list[dict[str, Any]], Conversation, list[tuple[int, Conversation]]]:
    """
    The messages of a session, what was said, and, for each turn, how many messages there were and what was said before it.

    Raises:
        ValueError: naming the file, if one is broken or does not fit the pipeline, before the model is asked for anything.
    """
    file, turns = place / SESSION_FILE, description["turns"]
    try:
        records = _image_records(turns)
        for record in (record for record in records if "latents" in record):
            _check_latents(place / record["latents"], record["grids"][0], pipe.latent_dim)
        images = {record["picture"]: _image(place, record, pipe) for record in records}
    except (LookupError, TypeError, AttributeError) as error:
        raise _no_session(file, error) from error
    messages = [
        {"role": message["role"], "content": [_part(part, images) for part in content_parts(message)]}
        for message in description["messages"]
    ]
    said, before = Conversation(), []
    try:
        for turn in turns:
            before.append(said)
            said = said.at_next_turn()
            for record in turn:
                if "picture" in record:
                    said = said.with_image(images[record["picture"]])
                else:
                    said = said.with_text(_text(record, pipe))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise _no_session(file, error) from error
    questions = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return messages, said, list(zip(questions, before, strict=True))


def _part(part: dict[str, Any], images: dict[str, SaidImage]) -> dict[str, Any]:
    """A part of a message, with its picture."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    return {"type": "image", "image": images[part["image"]].vae.segment.content}


def _text(record: dict[str, Any], pipe: Any) -> SaidText:
    def encoded(text: str) -> EncodedSegment:
        sanitize = record.get("sanitize_control_tokens", False)
        return pipe.processor.encode_segments([Segment("text", text, sanitize_control_tokens=sanitize)])[0]

    untagged = encoded(record["untagged"]) if "untagged" in record else None
    return SaidText(encoded(record["text"]), Update(**record["update"]), untagged, record["is_written"])


def _image(place: Path, record: dict[str, Any], pipe: Any) -> SaidImage:
    file, images_kwargs = place / record["picture"], record.get("images_kwargs", {})
    picture = _read(file)
    try:
        check_images_kwargs(images_kwargs)
        vae, vit = encode_image(pipe, picture, record["is_resized"], images_kwargs)
    except ValueError as error:
        raise ValueError(f"'{file}' does not fit the pipeline: {error}") from error
    grids = [list(vae.grid), list(vit.grid)]  # type: ignore[arg-type]  # an image has them
    if grids != record["grids"]:
        raise ValueError(
            f"'{file}' was read as {shown(record['grids'])} tokens by VAE and ViT, and is {grids} here. Load the pipeline with "
            "the sizes of images that the session had."
        )
    if "latents" in record:
        vae = replace(vae, latents=_read(place / record["latents"]).to(pipe._execution_device))
    elif pipe.vae is not None:
        # It was said where nothing could be drawn.
        vae = replace(vae, latents=pipe.encode_image(vae.pixels, vae_sample_mode="argmax"))
    update, encoders = Update(**record["update"]), tuple(record["encoders"])
    return SaidImage(vae, vit, update, encoders, record["is_given"], record["is_resized"], images_kwargs)


def _check_latents(file: Path, grid: Sequence[int], latent_dim: int) -> None:
    try:
        tensor = open_tensors([file])["latents"]
    except (OSError, LookupError) as error:
        raise _broken(file) from error
    shape = (grid[0] * grid[1], latent_dim)
    if tensor.shape != shape or tensor.dtype != torch.float32:
        raise ValueError(
            f"'{file}' holds {tensor.dtype} of shape {tensor.shape}, and the model needs {torch.float32} of {shape}: the session "
            "is another model's, or the file is broken. Restore it with the model that it was saved with, or from a copy."
        )


def _read(file: Path) -> Any:
    """A picture, or latents, as they were saved."""
    try:
        content = to_rgb(file) if file.suffix == ".png" else open_tensors([file])["latents"][...]
    except (OSError, LookupError, ValueError) as error:
        raise _broken(file) from error
    if _digest(content) not in file.name:
        raise _broken(file)
    return content


def _is_whole(file: Path) -> bool:
    try:
        _read(file)
    except ValueError:
        return False
    return True


def _broken(file: Path) -> ValueError:
    return ValueError(f"'{file}' is broken, or was changed after the session was saved. {_REMEDY}")


def _digest(content: Image.Image | torch.Tensor) -> str:
    """What is in the name of a file that holds this."""
    array = np.asarray(content)
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:16]
