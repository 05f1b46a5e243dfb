# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""From a conversation to the inputs of the model."""

import copy
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from transformers import CONFIG_MAPPING, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase, TextInput
from transformers.utils.chat_parsing.response_templates import load_response_template

from .checkpoints import check_folder, read_json
from .configuration_bagel import BagelConfig
from .errors import shown
from .files import HUB_ARGUMENTS, TOKENIZER, find_file, folder_and_file, hub_arguments, place_of
from .fine_tunes import image_settings
from .image_processing_bagel import BagelImageProcessor, BagelImageProcessorKwargs, check_rgb, image_from_array
from .loading import InstalledCodeMixin, check_stated_ids
from .original_config import is_original_config
from .responses import RESPONSE_TEMPLATE, with_pictures, without_end
from .segments import (
    CHAT_TEMPLATE,
    GENERATION_THINK_PROMPT,
    LATENT_TOKEN,
    SPECIAL_TOKENS,
    UNDERSTANDING_THINK_PROMPT,
    EncodedSegment,
    Segment,
    check_conversation,
    content_parts,
    encode_segments,
)
from .weights import contents


# Seconds of work, and some hundred thousand messages.
MAX_TEMPLATE_LINES = 5_000_000


class BagelProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    images_kwargs: BagelImageProcessorKwargs


class BagelProcessor(InstalledCodeMixin, ProcessorMixin):
    r"""
    Turns conversations, or text with placeholders and images, into the inputs of [`BagelForConditionalGeneration`].

    Args:
        image_processor ([`BagelImageProcessor`]): Reads the images.
        tokenizer ([`Qwen2Tokenizer`]): Reads the text.
        chat_template (`str`, *optional*): Another template than BAGEL's own.
    """

    valid_processor_kwargs = BagelProcessorKwargs
    text_kwargs = {"padding": True, "padding_side": "left"}
    return_mm_token_type_ids = True
    skip_tensor_conversion = ["vae_pixel_values"]

    def __init__(
        self,
        image_processor: BagelImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
    ):
        tokenizer = _bagel_tokenizer(tokenizer)
        self.image_token = SPECIAL_TOKENS["image_token_id"]
        self.latent_token = SPECIAL_TOKENS["latent_token_id"]
        self.vision_start_token = SPECIAL_TOKENS["vision_start_token_id"]
        self.vision_end_token = SPECIAL_TOKENS["vision_end_token_id"]
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.latent_token_id = tokenizer.convert_tokens_to_ids(self.latent_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "BagelProcessor":
        """
        As [`ProcessorMixin.from_pretrained`], also from the original layout.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or directory.
            base (`str` or `os.PathLike`, *optional*): Where the tokenizer is, if this place has weights alone.
            kwargs: `revision`, `token` and so on, and settings of [`BagelImageProcessor`].

        Raises:
            OSError: if the tokenizer is missing.
            ValueError: naming the file, if one cannot be used, or if the `config.json` beside them contradicts them.
        """
        own, base = folder_and_file(pretrained_model_name_or_path)[0], kwargs.pop("base", None)
        check_folder(own, kwargs.get("subfolder") or "")
        own_hub = hub_arguments(own, kwargs)
        path, hub = place_of(own, base, TOKENIZER, own_hub)
        # Types are those of a model.
        left_out = (*HUB_ARGUMENTS, "dtype", "torch_dtype")
        kwargs = {name: value for name, value in kwargs.items() if name not in left_out} | hub
        if kwargs.get("_from_pipeline") == "any-to-any":
            # That pipeline says too late whether it wants a picture, which begins from the images' latents.
            kwargs.setdefault("return_vae_pixel_values", True)
        _check_files(path, hub)
        try:
            processor_dict, settings = cls.get_processor_dict(path, **kwargs)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"The processor in '{path}' cannot be used: {error}") from error
        given = {key: kwargs.pop(key) for key in BagelImageProcessor.valid_kwargs.__annotations__ if key in kwargs}
        images, images_hub = place_of(own, path, _IMAGE_SETTINGS, own_hub)
        if images != own or not any(find_file(own, name, **own_hub) for name in _IMAGE_SETTINGS):
            given = image_settings(own) | given
        parts = [
            _load_image_processor(images, given, kwargs | images_hub, (own, base, own_hub)),
            _load_tokenizer(path, kwargs),
        ]
        return cls.from_args_and_dict(parts, processor_dict, **settings)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs: Unpack[BagelProcessorKwargs],
    ) -> BatchFeature:
        """
        Tokens of texts and patches of images.

        Args:
            images (*optional*):
                The images of all texts, in the order of their placeholders: one, a list, or a list of lists.
            text (`str` or `list[str]`):
                Segments with their markers. `<|vision_start|><|image_pad|><|vision_end|>` stands for an image that
                is seen; `<|vision_start|><|vision_pad|><|vision_end|>` before it asks for its latents too.
            kwargs: Arguments of the tokenizer and of [`BagelImageProcessor`], e.g. `return_tensors="pt"`.

        Returns:
            [`BatchFeature`]: `input_ids`, `attention_mask`, `mm_token_type_ids` of shape `(batch, tokens)`, left
            padded; with images `pixel_values` `(patches, patch_dim)` and `image_grid_hw` `(images, 2)`; and, if
            latents are asked for, `vae_pixel_values`, a list with a `(3, height, width)` tensor an image.

        Raises:
            ValueError: if the placeholders and the images differ in number.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(item, str) for item in texts):
            raise TypeError(f"`text` must be a string or a list of strings, got {shown(text)}.")
        for index, sample in enumerate(texts):
            if not kwargs.get("sanitize_control_tokens"):
                self._check_markers(sample)
            self._check_placeholders(sample, images, index, len(texts))
        image_settings = (kwargs.get("images_kwargs") or {}) | kwargs
        if not image_settings.get("do_convert_rgb", self.image_processor.do_convert_rgb):
            check_rgb(images)
        if any(self._wrapped(self.latent_token) in sample for sample in texts):
            kwargs["return_vae_pixel_values"] = True
        return super().__call__(images=images, text=text, **kwargs)

    def _wrapped(self, token: str) -> str:
        """A placeholder between its markers: what stands for an image."""
        return self.vision_start_token + token + self.vision_end_token

    def _check_markers(self, text: str) -> None:
        for token in (self.image_token, self.latent_token):
            if text.count(self._wrapped(token)) != text.count(token):
                raise ValueError(
                    f"`text` has a {token} without its markers. Write it as {self._wrapped(token)}, or pass "
                    "`sanitize_control_tokens=True` to `apply_chat_template` if it is somebody's own words."
                )

    def _check_placeholders(self, text: str, images: Any, index: int, num_texts: int) -> None:
        num_images, num_latents = (text.count(self._wrapped(token)) for token in (self.image_token, self.latent_token))
        if num_latents not in (0, num_images):
            raise ValueError(
                f"`text` has {num_latents} {self.latent_token} and {num_images} {self.image_token}: an image that is "
                "a condition for drawing needs one of each."
            )
        nested = isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)
        if not nested:
            return
        if len(images) != num_texts:
            raise ValueError(f"`images` holds the images of {len(images)} texts, but `text` holds {num_texts}.")
        given = len(images[index]) if isinstance(images[index], (list, tuple)) else 1
        if given != num_images:
            raise ValueError(
                f"`text` {index} has {num_images} {self.image_token}, but `images` holds {given} images for it."
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The placeholders of the tokens of an image: of its latents, if they are asked for, and of the ViT."""
        grids = image_inputs["image_grid_thw" if "image_grid_thw" in image_inputs else "image_grid_hw"]
        seen = self.image_token * int(grids[image_idx].prod())
        if "vae_pixel_values" not in image_inputs:
            return seen
        # One replacement serves both placeholders of an image; `get_text_with_replacements` parts them.
        rows, columns = (
            side // self.image_processor.vae_stride for side in image_inputs["vae_pixel_values"][image_idx].shape[1:]
        )
        return self.latent_token * (rows * columns) + seen

    def get_text_with_replacements(
        self,
        text: list[str],
        images_replacements: list[str] | None = None,
        videos_replacements: list[str] | None = None,
        audio_replacements: list[str] | None = None,
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Like the parent's, for the placeholders of the latents and of the ViT tokens."""
        replacements = images_replacements or []
        originals = list(text)
        vit = [replacement.replace(self.latent_token, "") for replacement in replacements]
        text, offsets = super().get_text_with_replacements(text, vit)
        vae = [replacement.replace(self.image_token, "") for replacement in replacements]
        if not any(vae):
            return text, offsets
        start, pattern, end = map(re.escape, (self.vision_start_token, self.latent_token, self.vision_end_token))
        pattern = f"(?<={start}){pattern}(?={end})"
        places, latents = iter(vae), iter(vae)
        for original, own in zip(originals, offsets, strict=True):
            for match in re.finditer(pattern, original):
                token, replacement = match.group(), next(places)
                own.append({"type": "image", "text": token, "replacement": replacement, "span": match.span()})
            own.sort(key=lambda item: item["span"])
            gained = 0
            for item in own:
                start = item["span"][0] + gained
                item["new_span"] = (start, start + len(item["replacement"]))
                gained += len(item["replacement"]) - len(item["text"])
        return [re.sub(pattern, lambda _: next(latents), sample) for sample in text], offsets

    def create_mm_token_type_ids(self, input_ids: list) -> list[list[int]]:
        """0 for text, 1 for ViT placeholders, 4 for latent placeholders."""
        types = super().create_mm_token_type_ids(input_ids)
        return [
            [LATENT_TOKEN if token == self.latent_token_id else kind for token, kind in zip(row, kinds, strict=True)]
            for row, kinds in zip(input_ids, types, strict=True)
        ]

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """
        Like [`ProcessorMixin.apply_chat_template`], with two more arguments.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                Messages of one conversation, or of several, in the format of transformers or of OpenAI. Image parts may
                leave out their images where the text alone is asked for, or with `processor_kwargs={"images": ...}`.
            chat_template (`str`, *optional*): Another template.
            think (`bool`, *optional*, defaults to `False`): Ask for a reasoning, or a plan, first.
            generation_mode (`str`, *optional*, defaults to `"text"`):
                `"text"` to answer; `"image"` to draw, which gives every image also as latents.
            kwargs: Arguments of [`ProcessorMixin.apply_chat_template`]. With `sanitize_control_tokens=True` special
                tokens in the messages are words like others: for what strangers write.

        Raises:
            ValueError: if a message has no content, or an unknown role or part; or if another template than BAGEL's own
                is broken, or never seems to end.
        """
        generation_mode = kwargs.get("generation_mode", "text")
        if generation_mode not in ("text", "image"):
            raise ValueError(f"`generation_mode` must be 'text' or 'image', got {shown(generation_mode)}.")
        takes_images = kwargs.get("tokenize") and not (kwargs.get("processor_kwargs") or {}).get("images")
        check_conversation(conversation, placeholders=not takes_images)
        conversation = _named_parts(conversation)
        is_own = (chat_template or self.chat_template) == CHAT_TEMPLATE
        try:
            with nullcontext() if is_own else bounded_template(MAX_TEMPLATE_LINES):
                return super().apply_chat_template(conversation, chat_template, **kwargs)
        except (TemplateError, OverflowError) as error:
            raise ValueError(f"The chat template cannot be used: {error}.") from error

    def parse_response(
        self, response: Any, schema: dict | None = None, *, prefix: Any = "", tools: list | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """
        Like [`ProcessorMixin.parse_response`], for answers with pictures, too.

        Args:
            response (`str`, token ids, or a list or tensor of them): What was generated, without the prompt.
            schema (`dict`, *optional*): A response template, by default the tokenizer's.
            prefix (*optional*): The prompt, where it begins the answer: BAGEL's template never does.
            tools (`list`, *optional*): As there.

        Returns:
            `dict`, or a list of them for a batch: `role`; `reasoning_content`, what stands between `<think>` and `</think>`
            or, if it was cut off, behind `<think>`; and `content`, the words, or, where there are placeholders of pictures, a
            list of parts in order.

        Raises:
            TypeError: if `response` is neither text nor token ids.
        """
        if not isinstance(response, (str, list, tuple)) and not hasattr(response, "tolist"):
            raise TypeError(f"`response` must be a text, token ids, or a list of them, got {shown(response)}.")
        parsed = super().parse_response(response, schema, prefix=prefix, tools=tools)
        return with_pictures(parsed) if isinstance(parsed, dict) else [with_pictures(message) for message in parsed]

    def encode_segments(self, segments: Sequence[Segment], **image_settings: Any) -> list[EncodedSegment]:
        """Segments as tokens, see [`~segments.encode_segments`]; whatever the chat template is."""
        return encode_segments(self, segments, **image_settings)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """
        ViT tokens of images, as servers ask for them to plan their memory.

        Args:
            image_sizes (`Sequence[tuple[int, int]]`, *optional*): Height and width of each image in pixels.
            kwargs: Settings of [`BagelImageProcessor`].
        """
        if image_sizes is None:
            return MultiModalData()
        settings = self._merge_kwargs(**kwargs)["images_kwargs"]
        counts = [self.image_processor.get_number_of_image_patches(*size, settings) for size in image_sizes]
        return MultiModalData(num_image_tokens=counts, num_image_patches=counts)

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[str] | list[Image.Image]:
        """
        Like the parent's, which decodes texts; and the pictures of `generate(..., generation_mode="image")` as PIL images.

        Args:
            generated_outputs (`torch.Tensor` or `Sequence[torch.Tensor]`): Token ids, or pictures in [0, 1].
            skip_special_tokens (`bool`, *optional*, defaults to `True`): Whether texts lose their special tokens.
            generation_mode (`str`, *optional*, defaults to `"text"`): `"text"` or `"image"`.
            kwargs: Of the tokenizer's `decode`.
        """
        if generation_mode == "image":
            return [image_from_array(image) for image in generated_outputs]
        return super().post_process_multimodal_output(
            generated_outputs, skip_special_tokens=skip_special_tokens, generation_mode=generation_mode, **kwargs
        )

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> str | list[str]:
        """
        Like the parent's, without what ends a text and pads a batch: pipelines decode with special tokens where there is a
        response template, and not everybody who asks them has the text parsed.
        """
        texts = super().post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)
        return without_end(texts) if isinstance(texts, str) else [without_end(text) for text in texts]

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]


def _named_parts(conversation: Any) -> list[Any]:
    """Messages whose lists of parts are named as transformers names them."""
    if isinstance(conversation[0], (list, tuple)):
        return [_named_parts(messages) for messages in conversation]
    return [
        {**message, "content": content_parts(message)}
        if isinstance(message.get("content"), (list, tuple))
        else dict(message)
        for message in conversation
    ]


@contextmanager
def bounded_template(lines: int) -> Iterator[None]:
    """
    Stop a chat template that runs more `lines` than any conversation needs: it is a program, perhaps of a stranger, and
    what jinja bounds is a single loop. Under a debugger, which needs the same hook, nothing is stopped.

    Raises:
        ValueError: from within the template.
    """
    left = lines

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != "<template>":
            return None
        left -= 1
        if left < 0:
            raise ValueError(f"The chat template ran {lines} lines, and was stopped. Pass another `chat_template`.")
        return trace

    if sys.gettrace() is not None:
        yield
        return
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def _bagel_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy with BAGEL's special tokens: what stops a text and what pads it is the same for everyone who asks."""
    tokenizer = copy.deepcopy(tokenizer)
    # The embeddings of placeholders are never read, so a tokenizer without them may be given new ones.
    absent = [token for token in SPECIAL_TOKENS.values() if token not in tokenizer.get_vocab()]
    if absent:
        tokenizer.add_tokens(absent, special_tokens=True)
    # What talks to the tokenizer alone finds the template there.
    tokenizer.chat_template = CHAT_TEMPLATE
    if getattr(tokenizer, "response_template", None) is None:
        tokenizer.response_template = RESPONSE_TEMPLATE
    try:
        load_response_template(tokenizer.response_template)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"`response_template` of the tokenizer cannot be used: {error}") from error
    tokenizer.padding_side = "left"
    tokenizer.eos_token = SPECIAL_TOKENS["eos_token_id"]
    tokenizer.pad_token = SPECIAL_TOKENS["pad_token_id"]
    return tokenizer


_IMAGE_SETTINGS = ("processor_config.json", "preprocessor_config.json")

# All that the libraries read here, and what must be beside it if anything is.
_FILES = (*_IMAGE_SETTINGS, "tokenizer_config.json", *TOKENIZER)


def _check_files(path: str | os.PathLike, hub: dict[str, Any]) -> None:
    for name in _FILES:
        if (file := find_file(path, name, **hub)) is not None:
            longest = read_json(file).get("model_max_length")
            if name == "tokenizer_config.json" and not isinstance(longest, (int, float, type(None))):
                raise ValueError(f"`model_max_length` in '{file}' must be a number, got {shown(longest)}.")
    if (file := find_file(path, "config.json", **hub)) is None:
        return
    settings = read_json(file)
    model_type = settings.get("model_type", BagelConfig.model_type)
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not is_known or not issubclass(CONFIG_MAPPING[model_type], BagelConfig):
        raise ValueError(f"`model_type` in '{file}' is {shown(model_type)}, expected {BagelConfig.model_type!r}.")
    if not is_original_config(settings):
        check_stated_ids(settings, f"'{file}'", path, **hub)


def _load_image_processor(
    path: str | os.PathLike, settings: dict[str, Any], kwargs: dict[str, Any], model: tuple
) -> BagelImageProcessor:
    hub = hub_arguments(path, kwargs)
    whole, alone = (find_file(path, name, **hub) for name in _IMAGE_SETTINGS)
    if whole or alone:
        if whole and not alone and "image_processor" not in read_json(whole):
            raise ValueError(f"`image_processor` is missing in '{whole}'.")
        try:
            return BagelImageProcessor.from_pretrained(path, **kwargs, **settings)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"The settings of images in '{path}' cannot be used: {error}") from error
    # The original layout has no image settings: the original sizes, and the patches of its config.json.
    own, base, own_hub = model
    config = BagelConfig.from_pretrained(own, **own_hub, **({} if base is None else {"base": base}))
    original = {"patch_size": config.vision_config.patch_size, "vae_stride": config.latent_stride}
    return BagelImageProcessor(**(original | settings))


def _load_tokenizer(path: str | os.PathLike, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    hub = hub_arguments(path, kwargs)
    if not any(find_file(path, name, **hub) for name in ("tokenizer.json", "vocab.json")):
        raise OSError(
            f"'{path}' has neither tokenizer.json nor vocab.json: its tokenizer is missing; {contents(path, hub)}."
        )
    try:
        # Given a configuration, the library does not read the file, which may not be strict JSON.
        return AutoTokenizer.from_pretrained(path, config=BagelConfig(), **kwargs)
    except OSError:
        raise
    except Exception as error:  # The library that reads tokenizer.json raises no other.
        raise ValueError(f"The tokenizer in '{path}' cannot be used: {error}") from error


__all__ = ["GENERATION_THINK_PROMPT", "UNDERSTANDING_THINK_PROMPT", "BagelProcessor", "BagelProcessorKwargs"]
