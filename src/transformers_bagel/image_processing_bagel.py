# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""One image processor for both of BAGEL's views of an image: the VAE's pixels and the ViT's patches."""

import base64
import io
import os
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import ImageProcessingMixin  # noqa: F401  diffusers looks it up here
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .arrays import as_array, as_bytes, unbatched
from .errors import shown
from .scalars import plain_numbers
from .urls import fetch


# Pixels of a side. Pillow has no memory to resize lines much longer than this.
MAX_SIDE = 1_000_000


class BagelImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    """
    patch_size (`int`, *optional*, defaults to 14):
        Side of a ViT patch in pixels.
    vae_size (`dict[str, int]`, *optional*, defaults to `{"shortest_edge": 512, "longest_edge": 1024}`):
        Bounds of an image that the VAE reads.
    vae_stride (`int`, *optional*, defaults to 16):
        Pixels per latent token and side; sides of VAE images are multiples of it.
    max_pixels (`int`, *optional*, defaults to 1806336):
        Bound of the area of either view: 14 * 14 * 9 * 1024.
    resize_before_vit (`bool`, *optional*, defaults to `True`):
        Whether the ViT sees the image after the VAE's resize, as the original demo does, or the original.
    return_vae_pixel_values (`bool`, *optional*, defaults to `False`):
        Whether to return the VAE's view too.
    return_image_grid_thw (`bool`, *optional*, defaults to `False`):
        Whether to return `image_grid_thw`, with a one before rows and columns, instead of `image_grid_hw`: for trainers
        that pass on a fixed list of names.
    """

    patch_size: int
    vae_size: dict[str, int]
    vae_stride: int
    max_pixels: int
    resize_before_vit: bool
    return_vae_pixel_values: bool
    return_image_grid_thw: bool


def resized_size(
    width: int, height: int, longest_edge: int, shortest_edge: int, stride: int, max_pixels: int
) -> tuple[int, int]:
    """Width and height of an image after BAGEL's resize (original behaviour, point 24).

    The shortest edge is raised to its bound first, so the longest may then have to be cut; the area is cut by a
    *linear* factor of the areas' ratio, as the original code does.

    Args:
        width, height (`int`): Size of the image in pixels.
        longest_edge, shortest_edge (`int`): Bounds of the edges in pixels.
        stride (`int`): Both edges become multiples of it.
        max_pixels (`int`): Bound of the area.
    """

    def scaled(scale: float) -> tuple[int, int]:
        edges = (round(round(edge * scale) / stride) * stride for edge in (width, height))
        new_width, new_height = (max(stride, edge) for edge in edges)
        return new_width, new_height

    scale = max(min(longest_edge / max(width, height), 1.0), shortest_edge / min(width, height))
    width, height = scaled(scale)
    if width * height > max_pixels:
        width, height = scaled(max_pixels / (width * height))
    if max(width, height) > longest_edge:
        width, height = scaled(longest_edge / max(width, height))
    return width, height


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """An image from a path, a URL, a data URI, base64 text, or a file's bytes, for [`to_rgb`] to load.

    The library's own `load_image` drops the transparency before it can be pasted on white.

    Raises:
        ValueError: if `source` is none of these, or if the image is over Pillow's pixel limit.
        OSError: if it cannot be read.
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    try:
        if isinstance(source, bytes):
            return Image.open(io.BytesIO(source))
        if name[:8].lower().startswith(("http://", "https://")):
            return Image.open(io.BytesIO(fetch(name)))
        if os.path.exists(name):
            if not os.path.isfile(name):
                raise OSError("it is no file")
            return Image.open(name)
        return Image.open(io.BytesIO(_from_base64(name)))
    except Image.DecompressionBombError as error:
        raise ValueError(f"`images` holds an image over Pillow's pixel limit: {error}") from error
    except UnidentifiedImageError as error:
        # Pillow's message would name a file object in memory.
        raise ValueError(f"`images` holds {shown(name)}, in which Pillow can identify no image.") from error
    except ValueError as error:
        _check_chunks(error, shown(name))
        raise ValueError(
            f"`images` holds {shown(name)}, which is no path, URL or base64 text of an image ({error})."
        ) from error
    except (OSError, SyntaxError) as error:
        raise OSError(f"`images` holds {shown(name)}, which cannot be read: {error}") from error


def _from_base64(text: str) -> bytes:
    """What base64 text stands for, alone or in a data URI: wrapped in lines, in either alphabet, with its end or not."""
    if text[:5].lower() == "data:":
        text = unquote(text.partition(",")[2])
    text = "".join(text.split()).rstrip("=")
    return base64.b64decode(
        text + "=" * (-len(text) % 4), altchars=b"-_" if {"-", "_"} & set(text) else None, validate=True
    )


def _check_chunks(error: ValueError, name: str) -> None:
    """Explain that Pillow reads no larger texts and colour profiles in a PNG, if that is what it says."""
    if any(words in str(error).lower() for words in ("too large", "text chunks")):
        raise ValueError(
            f"`images` holds {name}, a PNG with a text or colour profile above Pillow's limit of "
            f"{PngImagePlugin.MAX_TEXT_CHUNK} bytes. Save it without, or raise `PIL.PngImagePlugin.MAX_TEXT_CHUNK` if you "
            "trust its source."
        ) from error


def image_from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    """An image from values in [0, 1], [-1, 1] or 0 to 255, or in 16 bits, of shape `(height, width)`, or with 1, 3 or 4
    channels at either end, alone or in a batch of one.

    Where both ends could be the channels, a tensor has them first and an array last, as their libraries do.

    Raises:
        TypeError: if the values are no numbers.
        ValueError: if the shape is not that of an image, or if values are out of range.
    """
    axes = (0, -1) if isinstance(array, torch.Tensor) else (-1, 0)
    values = as_array(array)
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim == 3:
        ends = [axis for axis in axes if values.shape[axis] in (1, 3, 4)]
        values = np.moveaxis(values, ends[0], -1) if ends else values
    if values.ndim not in (2, 3) or 0 in values.shape or (values.ndim == 3 and not ends):
        raise ValueError(
            f"`images` holds an array of shape {tuple(array.shape)}; pass (height, width), or with 1, 3 or 4 channels "
            "first or last."
        )
    pixels = as_bytes(values)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def shallow(image: Image.Image) -> Image.Image:
    """An image whose channels have 8 bits: Pillow's own conversions cut deeper grays off at 255.

    Raises:
        ValueError: if the values of a mode of 32 bits do not say what white is.
    """
    if image.mode == "F":
        grays = np.asarray(image)
        if not (grays.min() >= 0 and grays.max() <= 1):
            raise ValueError(
                f"`images` holds an image of mode F with values from {grays.min()} to {grays.max()}; scale them to [0, 1]."
            )
        return image_from_array(grays)
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    grays = np.asarray(image)
    darkest, brightest = grays.min(), grays.max()
    if image.mode == "I" and not (darkest >= 0 and (brightest == 0 or 255 < brightest <= 65535)):
        raise ValueError(
            f"`images` holds an image of mode I with values from {darkest} to {brightest}, which may have 8 bits or 16; "
            "say so by `image.convert('L')` or `image.convert('I;16')`."
        )
    if "transparency" in image.info:
        grays = np.where(grays == image.info["transparency"], 65535, grays)
    return Image.fromarray((grays / 257).round().astype(np.uint8))


def to_rgb(image: Any) -> Image.Image:
    """A new RGB image from a path, URL, PIL image, array or tensor: upright, with transparency pasted on white.

    Raises:
        TypeError: if `image` is none of these.
        ValueError: if it has no pixels, more than Pillow allows (`PIL.Image.MAX_IMAGE_PIXELS`), or an unknown white.
        OSError: if its file is truncated.
    """
    if isinstance(image, (str, os.PathLike)):
        image = open_image(image)
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        image = image_from_array(image)
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"`images` must hold PIL images, arrays, tensors, paths or URLs, got a `{type(image).__name__}`."
        )
    if 0 in image.size:
        raise ValueError(f"`images` holds an image without pixels: its size is {image.width} x {image.height}.")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"`images` holds an image of {image.width} x {image.height} pixels, more than Pillow's limit of {limit}. "
            "Shrink it, or raise `PIL.Image.MAX_IMAGE_PIXELS` if you trust its source."
        )
    if max(image.size) > MAX_SIDE:
        raise ValueError(
            f"`images` holds an image of {image.width} x {image.height} pixels, whose longer side is above {MAX_SIDE}. "
            "Cut it into parts."
        )
    filename = getattr(image, "filename", "")
    name = repr(filename) if filename else "an image"
    try:
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError) as error:
        raise OSError(f"`images` holds {name}, whose file is truncated or broken: {error}.") from error
    except (ValueError, AttributeError) as error:
        if isinstance(error, ValueError):
            _check_chunks(error, name)
        raise ValueError(f"`images` holds {name}, which was closed: {error}.") from error
    image = shallow(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Pillow turns premultiplied gray into no other mode.
    image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def patchify(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`(channels, height, width)` -> `(patches, patch_size ** 2 * channels)`, values in (row, column, channel) order."""
    channels, height, width = image.shape
    patches = image.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(1, 3, 2, 4, 0).reshape(-1, patch_size**2 * channels)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """The inverse of `patchify`: `(..., patches, patch_size ** 2 * channels)` -> `(..., channels, height, width)`."""
    cells = patches.unflatten(-2, grid).unflatten(-1, (patch_size, patch_size, -1))
    return cells.movedim(-1, -5).transpose(-3, -2).flatten(-2).flatten(-3, -2)


class BagelImageProcessor(PilBackend):
    r"""
    Resizes images as BAGEL was trained (PIL bicubic), and packs the ViT's patches of all of them.

    Args:
        size (`dict[str, int]`, *optional*, defaults to `{"shortest_edge": 224, "longest_edge": 980}`):
            Bounds of an image that the ViT reads.
        patch_size, vae_size, vae_stride, max_pixels, resize_before_vit, return_image_grid_thw:
            See [`BagelImageProcessorKwargs`].
    """

    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 224, "longest_edge": 980}
    default_to_square = False
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    patch_size = 14
    vae_size = {"shortest_edge": 512, "longest_edge": 1024}
    vae_stride = 16
    max_pixels = 14 * 14 * 9 * 1024
    resize_before_vit = True
    return_vae_pixel_values = False
    return_image_grid_thw = False
    valid_kwargs = BagelImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_hw"]

    def __init__(self, **kwargs: Unpack[BagelImageProcessorKwargs]) -> None:
        super().__init__(**{name: plain_numbers(value) for name, value in kwargs.items()})
        _check_settings({name: getattr(self, name) for name in self.valid_kwargs.__annotations__})

    def preprocess(self, images: ImageInput, *args: Any, **kwargs: Unpack[BagelImageProcessorKwargs]) -> BatchFeature:
        """
        Resize images, normalise them and cut them into patches.

        Args:
            images: An image, a list of images, or a list of lists, see [`to_rgb`].
            kwargs: Settings other than the processor's own, and `return_tensors`.

        Returns:
            [`BatchFeature`]: `pixel_values` of shape `(patches, patch_size ** 2 * 3)` and `image_grid_hw` of shape
            `(images, 2)`; with `return_vae_pixel_values=True` also `vae_pixel_values`, a list with a
            `(3, height, width)` tensor an image.

        Raises:
            TypeError, ValueError, OSError: if something is no image, or if a setting cannot be used.
        """
        settings = {name: plain_numbers(value) for name, value in kwargs.items()}
        _check_settings(settings)
        return super().preprocess(images, *args, **settings)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the parent's. `backend` and `use_fast`, by which others choose, choose nothing: there is one backend."""
        for name in ("backend", "use_fast"):
            kwargs.pop(name, None)
        return super().from_dict(image_processor_dict, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Load an image, or the images of a list or of a list of lists, see [`to_rgb`]."""
        images = unbatched(image_url_or_urls)
        if not isinstance(images, list):
            return to_rgb(images)
        if any(isinstance(nested, (list, tuple)) for item in images for nested in _items(item)):
            raise ValueError("`images` is nested too deeply: pass an image, a list, or a list of lists.")
        return [self.fetch_images(item) for item in images]

    def _preprocess_image_like_inputs(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        if not kwargs["do_convert_rgb"]:
            check_rgb(images)
        flat = _flat(self.fetch_images(images))
        if not flat:
            raise ValueError("`images` holds no image. Leave it out for text alone.")
        return self._preprocess(flat, *args, **kwargs)

    def _preprocess(
        self,
        images: list[Image.Image],
        size: SizeDict,
        do_resize: bool,
        do_rescale: bool,
        do_normalize: bool,
        resample: PILImageResampling,
        rescale_factor: float,
        image_mean: list[float],
        image_std: list[float],
        patch_size: int,
        vae_size: dict[str, int],
        vae_stride: int,
        max_pixels: int,
        resize_before_vit: bool,
        return_vae_pixel_values: bool,
        return_image_grid_thw: bool,
        return_tensors: str | TensorType | None = None,
        **kwargs: Unpack[BagelImageProcessorKwargs],
    ) -> BatchFeature:
        def resized(image: Image.Image, bounds: dict[str, int] | SizeDict, stride: int) -> Image.Image:
            if not do_resize:
                return image
            new_size = resized_size(*image.size, bounds["longest_edge"], bounds["shortest_edge"], stride, max_pixels)
            return image.resize(new_size, resample=resample)

        def normalized(image: Image.Image) -> torch.Tensor:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
            if do_rescale:
                pixels = pixels * rescale_factor if rescale_factor != 1 / 255 else pixels / 255
            if do_normalize:
                mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (image_mean, image_std))
                pixels = (pixels - mean) / std
            return pixels

        patches, grids, vae_pixels = [], [], []
        for image in images:
            vae_image = resized(image, vae_size, vae_stride)
            vit_image = resized(vae_image if resize_before_vit else image, size, patch_size)
            if vit_image.width % patch_size or vit_image.height % patch_size:
                raise ValueError(
                    f"`do_resize=False` needs images whose sides are multiples of `patch_size` ({patch_size}), got "
                    f"{vit_image.width} x {vit_image.height}."
                )
            patches.append(patchify(normalized(vit_image), patch_size))
            grids.append((vit_image.height // patch_size, vit_image.width // patch_size))
            if return_vae_pixel_values:
                vae_pixels.append(normalized(vae_image))
        name, frames = ("image_grid_thw", (1,)) if return_image_grid_thw else ("image_grid_hw", ())
        grid = np.array([(*frames, *sides) for sides in grids])
        data: dict[str, Any] = {"pixel_values": torch.cat(patches).numpy(), name: grid}
        features = BatchFeature(data, tensor_type=return_tensors)
        if return_vae_pixel_values:
            # One tensor an image: padding to a common size would change what the VAE sees at the borders.
            features["vae_pixel_values"] = vae_pixels
        return features

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Number of ViT tokens of an image of `height` x `width` pixels."""
        settings = {name: getattr(self, name) for name in self.valid_kwargs.__annotations__} | (images_kwargs or {})
        views = [("size", "patch_size")]
        if settings["resize_before_vit"]:
            views.insert(0, ("vae_size", "vae_stride"))
        for size, stride in views:
            longest, shortest = (settings[size][edge] for edge in ("longest_edge", "shortest_edge"))
            width, height = resized_size(width, height, longest, shortest, settings[stride], settings["max_pixels"])
        return (width // settings["patch_size"]) * (height // settings["patch_size"])


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_rgb(images: Any) -> None:
    """
    Refuse PIL images whose mode would have to be changed.

    Raises:
        ValueError: naming the mode.
    """
    modes = {image.mode for image in _flat(images) if isinstance(image, Image.Image)} - {"RGB"}
    if modes:
        raise ValueError(
            f"`do_convert_rgb=False` takes RGB images, got one of mode {min(modes)}. Convert it, or leave "
            "`do_convert_rgb` out."
        )


def _flat(images: Any) -> list[Any]:
    """The images of a list, or of a list of lists."""
    return [image for item in _items(images) for image in _items(item)]


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise a `ValueError` for settings that cannot work."""
    for name in ("patch_size", "vae_stride", "max_pixels"):
        value = settings.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {shown(value)}.")
    for name in ("size", "vae_size"):
        if settings.get(name) is None:
            continue
        edges = [_edge(settings[name], edge) for edge in ("shortest_edge", "longest_edge")]
        if not all(isinstance(edge, int) and edge >= 1 for edge in edges):
            raise ValueError(
                f"`{name}` must be like {{'shortest_edge': 224, 'longest_edge': 980}}, got {shown(settings[name])}."
            )


def _edge(bounds: Any, name: str) -> Any:
    return bounds.get(name) if isinstance(bounds, dict) else getattr(bounds, name, None)


__all__ = ["BagelImageProcessor", "BagelImageProcessorKwargs", "patchify", "resized_size", "to_rgb", "unpatchify"]
