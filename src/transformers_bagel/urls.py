# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Downloads from URLs that may come from anybody: bounded in time, size and redirects, and in the hosts that they reach."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub import is_offline_mode
from huggingface_hub.utils import get_session, httpx


# A part of IPv6 whose addresses end in one of IPv4 (RFC 6052).
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Addresses of IPv4 in a form of before (RFC 4291), and those that a site translates for itself (RFC 8215); the library takes
# both for public ones.
_LOCAL = [ipaddress.ip_network(network) for network in ("::/96", "64:ff9b:1::/48")]

# Of others, or of several, a piece that is read at a time could become gigabytes before anybody counts them.
_ENCODINGS = ("gzip", "deflate")


@dataclass(frozen=True)
class UrlLimits:
    """
    What a download may take.

    Attributes:
        seconds (`float`, defaults to 30): Of a download with its redirects.
        max_bytes (`int`, defaults to 100 MiB): Of what is downloaded.
        max_redirects (`int`, defaults to 5): Followed one after the other.
        private_hosts (`str`, defaults to `"named"`):
            Whether hosts with private, loopback or link-local addresses may be asked: `"allow"`; `"named"` only by the
            URL itself, not by a redirect to another host; `"refuse"`, where the URLs are those of strangers. A host that is
            not to be private is asked at the address that was looked at.
    """

    seconds: float = 30.0
    max_bytes: int = 100 * 2**20
    max_redirects: int = 5
    private_hosts: Literal["allow", "named", "refuse"] = "named"


# Of images that are given as URLs. Another value holds for the process, like `PIL.Image.MAX_IMAGE_PIXELS`.
LIMITS = UrlLimits()


def fetch(url: str, limits: UrlLimits | None = None) -> bytes:
    """
    What lies at an http(s) URL.

    Args:
        url (`str`): Where it lies.
        limits (`UrlLimits`, *optional*): By default `LIMITS`.

    Raises:
        ValueError: if it is no such URL.
        OSError: if it cannot be read, or goes beyond the limits.
    """
    limits = limits or LIMITS
    deadline = time.monotonic() + limits.seconds
    # The Hub's session refuses everything when the Hub is not to be asked, which says nothing of other places.
    try:
        with httpx.Client() if is_offline_mode() else nullcontext(get_session()) as client, _CutOff(limits) as cut_off:
            return _downloaded(client, _parsed(url), limits, deadline, cut_off)
    except httpx.TimeoutException as error:
        raise _too_slow(limits) from error
    except httpx.HTTPError as error:
        raise (_too_slow(limits) if time.monotonic() >= deadline else OSError(str(error))) from error


class _CutOff:
    """
    Ends the connections of a download when its time is over, whatever they wait for: the library counts the time of each read
    anew, so that a place that says a letter every second would be listened to for days.
    """

    def __init__(self, limits: UrlLimits):
        self.limits = limits
        self._stream: Any = None
        self._lock = threading.Lock()
        self._is_over = False
        self._timer = threading.Timer(limits.seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> _CutOff:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """What httpcore calls at each step of a request: the connection is the last that was made."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._lock:
                self._stream = info["return_value"]
        if self._is_over:
            raise _too_slow(self.limits)

    def _end(self) -> None:
        with self._lock:
            self._is_over = True
            if self._stream is not None:
                # One that is closed cannot be ended.
                with suppress(OSError):
                    self._stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def _downloaded(client: Any, place: Any, limits: UrlLimits, deadline: float, cut_off: _CutOff) -> bytes:
    named = None if limits.private_hosts == "refuse" else place.host
    for _ in range(limits.max_redirects + 1):
        is_trusted = limits.private_hosts == "allow" or place.host == named
        target: dict[str, Any] = {"url": place} if is_trusted else _at_public_address(place)
        # A connection that is used again would be one that nobody told of.
        headers = {"accept-encoding": ", ".join(_ENCODINGS), "connection": "close"} | target.pop("headers", {})
        extensions = {"trace": cut_off.trace} | target.pop("extensions", {})
        seconds = max(deadline - time.monotonic(), 1e-3)
        request = client.build_request("GET", **target, headers=headers, timeout=seconds, extensions=extensions)
        response = client.send(request, stream=True, follow_redirects=False)
        try:
            if not response.has_redirect_location:
                response.raise_for_status()
                return _body(response, limits, deadline)
            place = _parsed(str(place.join(response.headers["location"])))
        finally:
            response.close()
    raise OSError(f"more than {limits.max_redirects} redirects")


def _parsed(url: str) -> Any:
    try:
        place = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(str(error)) from error
    if place.scheme not in ("http", "https") or not place.host:
        raise ValueError("only http and https URLs with a host are read")
    return place


def _at_public_address(place: Any) -> dict[str, Any]:
    """Arguments of a request to a host by one of its addresses; another question for the address could be answered otherwise."""
    try:
        answers = socket.getaddrinfo(place.host, place.port or place.scheme, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise OSError(f"the host {place.host!r} cannot be found ({error})") from error
    addresses = [str(answer[4][0]) for answer in answers]
    if not addresses or not all(map(is_public, addresses)):
        raise OSError(f"the host {place.host!r} has a private address, which is not asked")
    host = place.netloc.decode("ascii").rpartition("@")[2]
    return {
        "url": place.copy_with(host=addresses[0]),
        "headers": {"host": host},
        "extensions": {"sni_hostname": place.host},
    }


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, those that it wraps included."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    wrapped = [getattr(ip, kind, None) for kind in ("ipv4_mapped", "sixtofour")]
    if ip in _NAT64:
        wrapped.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    if any(ip in network for network in _LOCAL):
        return False
    return all(part.is_global and not part.is_multicast for part in (ip, *filter(None, wrapped)))


def _body(response: Any, limits: UrlLimits, deadline: float) -> bytes:
    if (encoding := response.headers.get("content-encoding", "identity").lower()) not in (*_ENCODINGS, "identity"):
        raise OSError(f"it is compressed as {encoding[:32]!r}, which was not asked for")
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > limits.max_bytes:
            raise OSError(f"more than {limits.max_bytes} bytes")
        if time.monotonic() > deadline:
            break
    # One that was cut off may look like a whole one.
    if time.monotonic() > deadline:
        raise _too_slow(limits)
    return bytes(body)


def _too_slow(limits: UrlLimits) -> OSError:
    return OSError(f"more than {limits.seconds:g} seconds")


__all__ = ["LIMITS", "UrlLimits", "fetch"]
