# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Images of strangers, read within bounds, and pictures as bytes."""

from __future__ import annotations

import base64
import binascii
import io
import re
from threading import BoundedSemaphore

from PIL import Image

from transformers_bagel.image_processing_bagel import to_rgb
from transformers_bagel.urls import UrlLimits, fetch

from .errors import ApiError, too_large
from .settings import ServerSettings


# Pillow knows others, which few ask for and fewer have looked at for what they do with broken files.
_READ = ("PNG", "JPEG", "WEBP", "GIF")
FORMATS = ("png", "jpeg", "webp")
_DATA = re.compile(r"data:image/[\w.+-]{1,32};base64,", re.IGNORECASE)
_MAX_SECONDS, _MAX_BYTES = 20.0, 20 * 2**20
# A decoder may need several times the memory of the image that it makes.
_DECODING = BoundedSemaphore(4)


def content_at(url: str, param: str, settings: ServerSettings, seconds: float) -> bytes:
    """
    The file of an image that a URL holds, or which lies there and is had within so many seconds.

    Raises:
        ApiError: naming `param`, if it is not read from there, cannot be had, or is too large.
    """
    if data := _DATA.match(url):
        try:
            return base64.b64decode(url[data.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(f"`{param}` holds no valid base64 ({error}).", param, code="invalid_image") from error
    if not url[:8].lower().startswith(("http://", "https://")):
        raise ApiError(
            f"`{param}` must be a data URL, data:image/...;base64,...{' or an http(s) URL' * settings.allow_image_urls}.",
            param,
            code="invalid_image_url",
        )
    if not settings.allow_image_urls:
        raise ApiError(
            f"`{param}`: this server fetches no images. Send the image itself, as a data URL.",
            param,
            code="image_urls_not_allowed",
        )
    try:
        limits = UrlLimits(max(min(seconds, _MAX_SECONDS), 0.0), _MAX_BYTES, max_redirects=3, private_hosts="refuse")
        return fetch(url, limits)
    except (OSError, ValueError) as error:
        raise ApiError(f"`{param}` cannot be fetched: {error}.", param, code="invalid_image_url") from error


def image_of(content: bytes, param: str, settings: ServerSettings, left: int) -> Image.Image:
    """
    The image in the bytes of a file, in RGB and upright. Few are decoded at a time, whoever calls.

    Args:
        content (`bytes`): The file.
        param (`str`): The field that holds it.
        settings ([`ServerSettings`])
        left (`int`): Pixels that the request may still have.

    Raises:
        ApiError: naming `param`, if it cannot be read or has too many pixels, which is known before they are decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_READ) as image:
            pixels, size = image.width * image.height, f"{image.width} x {image.height}"
            if pixels <= min(settings.max_image_pixels, left):
                with _DECODING:
                    return to_rgb(image)
    except Image.DecompressionBombError:
        pixels, size = settings.max_image_pixels + 1, "far too many"
    except Exception as error:
        # Pillow raises many kinds of errors for what is broken in a file.
        raise ApiError(
            f"`{param}` is no image in {', '.join(_READ)} that can be read.", param, code="invalid_image"
        ) from error
    if pixels <= settings.max_image_pixels:
        raise too_large(f"`{param}`: the images of the request have more than {settings.max_pixels} pixels.", param)
    raise too_large(f"`{param}` has {size} pixels, and at most {settings.max_image_pixels} are read.", param)


def image_bytes(image: Image.Image, output_format: str, compression: int = 100) -> bytes:
    """A picture as a file; `compression` is the quality of what loses some."""
    stream = io.BytesIO()
    if output_format == "png":
        image.save(stream, "PNG")
    else:
        image.save(stream, output_format.upper(), quality=compression)
    return stream.getvalue()


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def data_url(content: bytes, output_format: str) -> str:
    return f"data:image/{output_format};base64,{in_base64(content)}"
