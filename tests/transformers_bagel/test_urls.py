"""Images at URLs that may come from anybody: bounded in time, size, redirects, and in the hosts that are asked."""

from __future__ import annotations

import gzip
import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub.utils import httpx, set_client_factory

from tests.conftest import golden_image
from transformers_bagel import urls
from transformers_bagel.image_processing_bagel import to_rgb
from transformers_bagel.urls import UrlLimits, fetch, is_public


class Pages(BaseHTTPRequestHandler):
    """What a path says: a picture, a place elsewhere, or trouble."""

    def do_GET(self):  # noqa: N802  the library's name
        getattr(self, self.path.strip("/").split("/")[0])()

    def picture(self):
        content = io.BytesIO()
        golden_image("square").save(content, "PNG")
        self._answer(content.getvalue())

    def long(self):
        self._answer(b"x" * 2000)

    def bomb(self):
        self._answer(gzip.compress(b"x" * 2_000_000), ("Content-Encoding", "gzip"))

    def twice(self):
        self._answer(gzip.compress(gzip.compress(b"x" * 2_000_000)), ("Content-Encoding", "gzip, gzip"))

    def brotli(self):
        self._answer(b"x", ("Content-Encoding", "br"))

    def text(self):
        self._answer(b"no picture")

    def missing(self):
        self.send_error(404)

    def loop(self):
        self._redirect("/loop")

    def near(self):
        self._redirect("/picture")

    def loopback(self):
        self._redirect(f"http://localhost:{self.server.server_port}/picture")

    def file(self):
        self._redirect("file:///etc/hostname")

    def slow(self):
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            # The other side has gone, as it should.
            pass

    def trickle(self):
        """Headers without an end."""
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            # The other side has gone, as it should.
            pass

    def silent(self):
        self.server.closing.wait(10)

    def _redirect(self, place: str):
        self.send_response(302)
        self.send_header("Location", place)
        self.end_headers()

    def _answer(self, body: bytes, *headers: tuple[str, str]):
        self.send_response(200)
        for header in (("Content-Length", str(len(body))), *headers):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.closing = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.closing.set()
    server.shutdown()
    server.server_close()


def test_an_image_behind_a_redirect_is_read(site):
    assert to_rgb(f"{site}/near").tobytes() == golden_image("square").convert("RGB").tobytes()


def test_a_scheme_may_be_in_capitals(site):
    assert to_rgb(f"{site.replace('http', 'HTTP')}/picture").size == golden_image("square").size


@pytest.mark.parametrize("path", ["picture", "near"])
def test_an_image_is_read_when_the_hub_is_not_to_be_asked(path, site, monkeypatch):
    """`HF_HUB_OFFLINE=1` is about the Hub; the library reads the images of messages all the same."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert huggingface_hub.is_offline_mode()
    assert to_rgb(f"{site}/{path}").size == golden_image("square").size


@pytest.mark.parametrize(
    ("path", "limits", "message"),
    [
        ("long", UrlLimits(max_bytes=1000), "more than 1000 bytes"),
        ("bomb", UrlLimits(max_bytes=1_000_000), "more than 1000000 bytes"),
        ("slow", UrlLimits(seconds=0.3), "more than 0.3 seconds"),
        ("silent", UrlLimits(seconds=0.3), "more than 0.3 seconds"),
        ("trickle", UrlLimits(seconds=0.3), "more than 0.3 seconds"),
        ("loop", UrlLimits(max_redirects=3), "more than 3 redirects"),
        ("loopback", UrlLimits(), "'localhost' has a private address"),
        ("picture", UrlLimits(private_hosts="refuse"), "'127.0.0.1' has a private address"),
        ("missing", UrlLimits(), "404"),
        ("twice", UrlLimits(), "compressed as 'gzip, gzip'"),
        ("brotli", UrlLimits(), "compressed as 'br'"),
    ],
)
def test_downloads_have_limits(path, limits, message, site, monkeypatch):
    monkeypatch.setattr(urls, "LIMITS", limits)
    start = time.monotonic()
    with pytest.raises(OSError, match=message) as raised:
        to_rgb(f"{site}/{path}")
    assert path in str(raised.value)
    assert time.monotonic() - start < 3


def test_who_allows_private_hosts_follows_redirects_to_them(site):
    assert fetch(f"{site}/loopback", UrlLimits(private_hosts="allow")).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://", "https:///x.png", "http://a b/x.png", "http://x:99999999/y"]
)
def test_what_is_no_url_is_refused_by_name(url):
    with pytest.raises((ValueError, OSError), match="`images` holds 'http"):
        to_rgb(url)


def test_redirects_leave_the_web_for_nothing(site):
    with pytest.raises(ValueError, match="only http and https"):
        to_rgb(f"{site}/file")


def test_a_page_without_picture_is_named(site):
    with pytest.raises(ValueError, match="identify no image"):
        to_rgb(f"{site}/text")


class TestNames:
    """A host is asked at the very address that was found public."""

    @pytest.fixture
    def asked(self) -> Iterator[list]:
        requests: list = []

        def answer(request):
            requests.append(request)
            return httpx.Response(200, content=b"picture")

        set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(answer)))
        yield requests
        set_client_factory(httpx.Client)

    @pytest.fixture
    def names(self, monkeypatch) -> dict[str, list[str]]:
        known: dict[str, list[str]] = {}

        def look_up(host, port, *args, **kwargs):
            if host not in known:
                raise socket.gaierror("unknown")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[host]]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        return known

    def test_of_a_public_one(self, names, asked):
        names["pictures.example"] = ["93.184.216.34"]
        limits = UrlLimits(private_hosts="refuse")
        assert fetch("https://pictures.example:8443/a.png?size=1", limits) == b"picture"
        (request,) = asked
        assert (request.url.host, request.url.port, request.url.raw_path) == ("93.184.216.34", 8443, b"/a.png?size=1")
        assert request.headers["host"] == "pictures.example:8443"
        assert request.extensions["sni_hostname"] == "pictures.example"

    @pytest.mark.parametrize("addresses", [["10.0.0.1"], ["93.184.216.34", "169.254.169.254"], ["::1"], []])
    def test_of_a_private_one(self, addresses, names, asked):
        names["pictures.example"] = addresses
        with pytest.raises(OSError, match=r"'pictures\.example' has a private address"):
            fetch("https://pictures.example/a.png", UrlLimits(private_hosts="refuse"))
        assert not asked

    def test_unknown(self, names, asked):
        with pytest.raises(OSError, match=r"'nowhere\.example' cannot be found"):
            fetch("https://nowhere.example/a.png", UrlLimits(private_hosts="refuse"))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
        ("100.64.0.1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("64:ff9b:1::808:808", False),
        ("::127.0.0.1", False),
        ("::10.0.0.1", False),
    ],
)
def test_public_addresses(address, expected):
    assert is_public(address) is expected
