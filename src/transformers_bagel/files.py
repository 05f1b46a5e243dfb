# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Files by their names: in a folder, or in a repository of the Hub."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import httpx
from transformers.utils import cached_file, resolve_revision


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# Of each of these groups, a checkpoint has one file at least.
SETTINGS = ("config.json", "llm_config.json")
TOKENIZER = ("tokenizer.json", "vocab.json")


def hub_arguments(path: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the `kwargs` of any `from_pretrained` that say where files are, with the revision resolved, so that all
    files are of one commit."""
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    access = {name: hub[name] for name in ("token", "local_files_only", "cache_dir") if name in hub}
    revision = resolve_revision(path, hub.get("revision"), **access)
    return hub if revision is None else hub | {"revision": revision}


def find_file(path: str | os.PathLike, name: str, **hub: Any) -> str | None:
    """
    The local path of a file of a directory, or of a repository of the Hub (see [`hub_arguments`]), from where it is
    downloaded; `None` if there is no such file, or none in the cache when offline.

    Raises:
        OSError: if the Hub cannot tell.
    """
    if os.path.isdir(path):
        file = os.path.join(path, hub.get("subfolder", ""), name)
        return file if os.path.isfile(file) else None
    if hasattr(hub.get("revision"), "resolved") and not hub.get("force_download"):
        # A commit does not change: of a file that is known to be absent, the library would ask the Hub again.
        if find_cached(path, name, hub) is _CACHED_NO_EXIST:
            return None
    try:
        return hf_hub_download(str(path), name, **hub)
    except LocalEntryNotFoundError:
        if is_offline(hub) or find_cached(path, name, hub) is _CACHED_NO_EXIST:
            return None
    except EntryNotFoundError:
        return None
    except (OSError, ValueError):
        pass
    # Raises what users of the library know.
    return cached_file(path, name, **hub)


def is_offline(hub: dict[str, Any]) -> bool:
    return bool(hub.get("local_files_only")) or is_offline_mode()


def find_cached(path: str | os.PathLike, name: str, hub: dict[str, Any]) -> Any:
    revision = hub.get("revision")
    return try_to_load_from_cache(
        str(path),
        in_subfolder(name, hub),
        cache_dir=hub.get("cache_dir"),
        revision=getattr(revision, "resolved", revision),
    )


def in_subfolder(name: str, hub: dict[str, Any]) -> str:
    return f"{hub['subfolder']}/{name}" if hub.get("subfolder") else name


def file_names(path: str | os.PathLike, **hub: Any) -> list[str]:
    """
    The names of the files of a directory, or of a repository of the Hub (see [`hub_arguments`]), without those of folders in
    it; when offline, or if the Hub does not answer, of those in the cache.

    Raises:
        OSError: if the Hub cannot tell, and nothing of the repository is in the cache.
    """
    if os.path.isdir(path):
        folder = os.path.join(path, hub.get("subfolder", ""))
        entries = os.scandir(folder) if os.path.isdir(folder) else ()
        return sorted(entry.name for entry in entries if entry.is_file())
    if is_offline(hub):
        return _cached_names(path, hub) or []
    revision = getattr(hub.get("revision"), "resolved", hub.get("revision"))
    try:
        # Asked once: to list files, the library would ask a Hub that does not answer again and again.
        siblings = HfApi().model_info(str(path), revision=revision, token=hub.get("token")).siblings or []
    except (httpx.TransportError, HfHubHTTPError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        if (names := _cached_names(path, hub)) is not None:
            return names
        raise OSError(
            f"'{path}': the Hub cannot be reached ({error}), and the cache holds nothing of this repository. Try again, or "
            "name a local folder."
        ) from error
    prefix, names = in_subfolder("", hub), [sibling.rfilename for sibling in siblings]
    return sorted(
        name.removeprefix(prefix) for name in names if name.startswith(prefix) and "/" not in name[len(prefix) :]
    )


def _cached_names(path: str | os.PathLike, hub: dict[str, Any]) -> list[str] | None:
    place: dict[str, Any] = {name: hub.get(name) for name in ("revision", "cache_dir")}
    try:
        # No pattern, because the cache may lack files that nobody asked for.
        folder = snapshot_download(str(path), **place, local_files_only=True, allow_patterns=[])
    except LocalEntryNotFoundError:
        return None
    return file_names(folder, subfolder=hub.get("subfolder", ""))


def folder_and_file(path: str | os.PathLike) -> tuple[str | os.PathLike, str | None]:
    """The folder and the name of a local file of weights; a folder or a Hub id as it is."""
    if str(path).endswith((".safetensors", ".gguf")) and os.path.isfile(path):
        return os.path.split(os.path.abspath(path))
    return path, None


def place_of(
    path: str | os.PathLike, base: str | os.PathLike | None, names: tuple[str, ...], hub: dict[str, Any]
) -> tuple[str | os.PathLike, dict[str, Any]]:
    """The first of two places that has a file of one of the names, and the Hub arguments by which it is read; the first
    place if none has, or if there is no other one."""
    if base is None or str(base) == str(path) or any(find_file(path, name, **hub) is not None for name in names):
        return path, hub
    kept = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    return base, hub_arguments(base, kept)
