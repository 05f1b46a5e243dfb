# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""One image processor for both of BAGEL's views of an image: the VAE's pixels and the ViT's patches."""

from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import ImageProcessingMixin  # noqa: F401  diffusers looks it up here
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType


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
        Whether the ViT sees the image after the VAE's resize, as the published demo does, or the original.
    return_vae_pixel_values (`bool`, *optional*, defaults to `False`):
        Whether to return the VAE's view too.
    """

    patch_size: int
    vae_size: dict[str, int]
    vae_stride: int
    max_pixels: int
    resize_before_vit: bool
    return_vae_pixel_values: bool


def resized_size(
    width: int, height: int, longest_edge: int, shortest_edge: int, stride: int, max_pixels: int
) -> tuple[int, int]:
    """Width and height of an image after BAGEL's resize (published behaviour, point 24).

    The shortest edge is raised to its bound first, so the longest may then have to be cut; the area is cut by a
    *linear* factor of the areas' ratio, as the published code does.

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


def to_rgb(image: Any) -> Image.Image:
    """A loaded RGB image from a PIL image, an array or a tensor; transparency is pasted on white.

    Raises:
        TypeError: if `image` is none of these.
        ValueError: if it has no pixels, or more than Pillow allows (`PIL.Image.MAX_IMAGE_PIXELS`).
        OSError: if its file is truncated.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        if image.ndim not in (2, 3) or 0 in image.shape:
            raise ValueError(
                f"`images` must hold images with pixels, got an array of shape {tuple(image.shape)}. Pass (height, "
                "width, channels) or (channels, height, width)."
            )
        image = to_pil_image(image.cpu().numpy() if isinstance(image, torch.Tensor) else image)
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
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise OSError(f"`images` holds an image whose file is truncated or broken: {error}.") from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def patchify(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`(channels, height, width)` -> `(patches, patch_size ** 2 * channels)`, values in (row, column, channel) order."""
    channels, height, width = image.shape
    patches = image.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(1, 3, 2, 4, 0).reshape(-1, patch_size**2 * channels)


class BagelImageProcessor(PilBackend):
    r"""
    Resizes images as BAGEL was trained (PIL bicubic), and packs the ViT's patches of all of them.

    Args:
        size (`dict[str, int]`, *optional*, defaults to `{"shortest_edge": 224, "longest_edge": 980}`):
            Bounds of an image that the ViT reads.
        patch_size, vae_size, vae_stride, max_pixels, resize_before_vit:
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
    valid_kwargs = BagelImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_hw"]

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Load paths and URLs; images that are there already pass through."""
        try:
            return super().fetch_images(image_url_or_urls)
        except Image.DecompressionBombError as error:
            raise ValueError(f"`images` holds an image over Pillow's pixel limit: {error}") from error
        except UnidentifiedImageError as error:
            raise ValueError(f"`images` names a file that is no image: {error}.") from error

    def _preprocess_image_like_inputs(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        images = self.fetch_images(images)
        flat = images if isinstance(images, (list, tuple)) else [images]
        # Checked one by one first: the library's flattening names neither the argument nor the remedy.
        for image in flat:
            for nested in image if isinstance(image, (list, tuple)) else [image]:
                if not isinstance(nested, (Image.Image, np.ndarray, torch.Tensor)):
                    to_rgb(nested)
        return self._preprocess([to_rgb(image) for image in make_flat_list_of_images(images)], *args, **kwargs)

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
        data: dict[str, Any] = {"pixel_values": torch.cat(patches).numpy(), "image_grid_hw": np.array(grids)}
        features = BatchFeature(data, tensor_type=return_tensors)
        if return_vae_pixel_values:
            # One tensor an image: padding to a common size would change what the VAE sees at the borders.
            features["vae_pixel_values"] = vae_pixels
        return features

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Number of ViT tokens of an image of `height` x `width` pixels."""
        settings = {name: getattr(self, name) for name in self.valid_kwargs.__annotations__} | (images_kwargs or {})
        if settings["resize_before_vit"]:
            bounds = settings["vae_size"]
            width, height = resized_size(
                width,
                height,
                bounds["longest_edge"],
                bounds["shortest_edge"],
                settings["vae_stride"],
                settings["max_pixels"],
            )
        bounds, patch_size = settings["size"], settings["patch_size"]
        width, height = resized_size(
            width, height, bounds["longest_edge"], bounds["shortest_edge"], patch_size, settings["max_pixels"]
        )
        return (width // patch_size) * (height // patch_size)


__all__ = ["BagelImageProcessor", "BagelImageProcessorKwargs", "patchify", "resized_size", "to_rgb"]
