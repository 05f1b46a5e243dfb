# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL configuration. Its defaults are the original 7B model; it reads the JSON files of that as they are."""

import os
from contextlib import nullcontext
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, Qwen2Config
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from .checkpoints import check_folder, read_json, strict_json
from .errors import shown
from .files import HUB_ARGUMENTS, SETTINGS, TOKENIZER, find_file, hub_arguments, place_of
from .loading import InstalledCodeMixin
from .original_config import (
    ORIGINAL_KEYS,
    correct_config,
    is_original_config,
    read_original_config,
    rename_original_keys,
)
from .training.losses import LOSS_REDUCTIONS
from .weights import contents, find_shapes


logger = logging.get_logger(__name__)

# The largest sizes of a model that anybody could mean, some 40 times those of the original. They keep a typing error from
# filling the memory: tables have the square of a side in rows, and no tensor gets more numbers than torch can count.
_LARGEST_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1024),
    **dict.fromkeys(("patch_size", "latent_patch_size", "latent_downsample"), 256),
    **dict.fromkeys(("max_latent_size", "vit_max_num_patch_per_side"), 4096),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "image_size"), 2**20),
    **dict.fromkeys(("num_channels", "latent_channels", "frequency_embedding_size"), 2**20),
    "max_position_embeddings": 2**30,
}


def _check_sizes(config: PreTrainedConfig) -> None:
    """
    Refuse sizes that no model has, before anything of that size is made, and activations that nobody knows.

    Raises:
        ValueError: naming the argument.
    """
    for name, largest in _LARGEST_SIZES.items():
        size = getattr(config, name, None)
        if size is not None and not 1 <= size <= largest:
            raise ValueError(f"`{name}` must be between 1 and {largest}, got {size}.")
    for name in ("hidden_act", "connector_act"):
        if getattr(config, name, "silu") not in ACT2FN:
            raise ValueError(f"`{name}` must be an activation of transformers, got {shown(getattr(config, name))}.")


@strict
class BagelTextConfig(Qwen2Config):
    r"""
    Configuration of the language model: Qwen2 whose every layer has a second set of weights for image latents.

    Args:
        qk_norm (`bool`, *optional*, defaults to `True`):
            Whether queries and keys pass an RMSNorm per head before the rotary embedding.
        visual_gen (`bool`, *optional*, defaults to `True`):
            Whether the second set of weights (`*_moe_gen`) exists. [`BagelConfig.visual_gen`] decides it.

    All other arguments are those of [`Qwen2Config`]; the defaults are Qwen2.5-7B's.
    """

    model_type = "bagel_text"
    base_config_key = "text_config"
    default_theta = 1_000_000.0
    base_model_tp_plan = {
        **Qwen2Config.base_model_tp_plan,
        "layers.*.self_attn.q_proj_moe_gen": "colwise",
        "layers.*.self_attn.k_proj_moe_gen": "colwise",
        "layers.*.self_attn.v_proj_moe_gen": "colwise",
        "layers.*.self_attn.o_proj_moe_gen": "rowwise",
        "layers.*.mlp_moe_gen.gate_proj": "colwise",
        "layers.*.mlp_moe_gen.up_proj": "colwise",
        "layers.*.mlp_moe_gen.down_proj": "rowwise",
        # A process has the heads of its own, so that its gradients are a part of these weights'.
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.q_norm_moe_gen": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm_moe_gen": "replicated_with_grad_allreduce",
    }
    base_model_fsdp_plan = {**Qwen2Config.base_model_fsdp_plan, "norm_moe_gen": "keep_full_weight"}

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    max_position_embeddings: int = 32768
    bos_token_id: int | None = 151644
    eos_token_id: int | list[int] | None = 151645
    pad_token_id: int | None = 151643
    qk_norm: bool = True
    visual_gen: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # The parent makes a list with an entry for each layer.
        _check_sizes(self)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of the `@strict` validation."""
        super().validate_architecture()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )


@strict
class BagelVisionConfig(PreTrainedConfig):
    r"""
    Configuration of the SigLIP tower that reads packed patches of images of any size.

    Args:
        image_size (`int`, *optional*, defaults to 980):
            Side in pixels of the largest image of the learned position table, which has
            `(image_size // patch_size) ** 2` rows.

    All other arguments are those of [`SiglipVisionConfig`]. `num_hidden_layers` is what the weights have: 26.
    """

    model_type = "bagel_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 26
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 980
    patch_size: int = 14
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Part of the `@strict` validation."""
        _check_sizes(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) of the vision tower must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )


@strict
class BagelConfig(InstalledCodeMixin, PreTrainedConfig):
    r"""
    Configuration of a [`BagelForConditionalGeneration`]. `BagelConfig()` is ByteDance-Seed/BAGEL-7B-MoT.

    Args:
        text_config (`BagelTextConfig` or `dict`, *optional*): The language model.
        vision_config (`BagelVisionConfig` or `dict`, *optional*): The vision tower.
        visual_gen (`bool`, *optional*, defaults to `True`):
            Whether the modules that draw exist (`*_moe_gen`, `vae2llm`, `llm2vae`, `time_embedder`,
            `latent_pos_embed`). `from_pretrained(..., visual_gen=False)` leaves them out.
        visual_und (`bool`, *optional*, defaults to `True`):
            Whether the modules that see images exist (`vision_tower`, `connector`, `vit_pos_embed`).
        latent_channels (`int`, *optional*, defaults to 16): Channels of the VAE latents.
        latent_downsample (`int`, *optional*, defaults to 8): Pixels per latent cell and side.
        latent_patch_size (`int`, *optional*, defaults to 2): Latent cells per token and side.
        max_latent_size (`int`, *optional*, defaults to 64): Side of the position table of latent tokens.
        vit_max_num_patch_per_side (`int`, *optional*, defaults to 70): Side of the position table of ViT tokens.
        interpolate_pos (`bool`, *optional*, defaults to `False`):
            Whether patch positions are spread over the whole table by buckets instead of counted from its corner.
        timestep_shift (`float`, *optional*, defaults to 1.0): Shift of the timesteps in training.
        ce_weight (`float`, *optional*, defaults to 1.0): Weight of the cross-entropy in the loss.
        mse_weight (`float`, *optional*, defaults to 1.0): Weight of the velocity's squared error in the loss.
        loss_reduction (`str`, *optional*, defaults to `"token"`):
            How each loss is averaged: per `"token"`, per `"sample"`, or with weights of the `"square_root"` of the
            samples' lengths.
        freeze_und (`bool`, *optional*, defaults to `False`):
            Whether no gradient reaches the understanding expert or passes through its activations.
            [`BagelForConditionalGeneration.freeze`] sets it. Training only; not saved.
        few_steps (`dict`, *optional*):
            How an adapter of few steps that was merged into the weights wants to be drawn with, see
            `diffusers_bagel.few_steps.FewSteps`.
        frequency_embedding_size (`int`, *optional*, defaults to 256): Width of the sinusoids of a timestep.
        connector_act (`str`, *optional*, defaults to `"gelu_pytorch_tanh"`): Activation of the ViT connector.
        image_token_id (`int`, *optional*, defaults to 151655): Placeholder of a ViT token (`<|image_pad|>`).
        latent_token_id (`int`, *optional*, defaults to 151654): Placeholder of a latent token (`<|vision_pad|>`).
        vision_start_token_id (`int`, *optional*, defaults to 151652): Marker before an image block.
        vision_end_token_id (`int`, *optional*, defaults to 151653): Marker after an image block.

    Example:

    ```python
    >>> from transformers_bagel import BagelConfig

    >>> BagelConfig().text_config.num_hidden_layers
    28
    ```
    """

    model_type = "bagel"
    sub_configs_defaults = {"text_config": BagelTextConfig, "vision_config": BagelVisionConfig}
    keys_to_ignore_at_inference = ["past_key_values"]
    # An original `config.json` that `AutoConfig` handed over without saying where its files are.
    original_config = None

    text_config: BagelTextConfig | dict | None = None
    vision_config: BagelVisionConfig | dict | None = None
    visual_gen: bool = True
    visual_und: bool = True
    latent_channels: int = 16
    latent_downsample: int = 8
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    interpolate_pos: bool = False
    timestep_shift: float | int = 1.0
    ce_weight: float | int = 1.0
    mse_weight: float | int = 1.0
    loss_reduction: str = "token"
    freeze_und: bool = False
    few_steps: dict | None = None
    frequency_embedding_size: int = 256
    connector_act: str = "gelu_pytorch_tanh"
    image_token_id: int = 151655
    latent_token_id: int = 151654
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        original = {key: kwargs.pop(key) for key in ORIGINAL_KEYS if key in kwargs}
        if type(self) is BagelConfig:
            # Names files of the repository that it was read from, which are not written beside a saved configuration.
            kwargs["auto_map"] = {}
        # A converted repository has both spellings; the original ones are there for other engines.
        if self.text_config is None:
            for key, value in rename_original_keys(original).items():
                setattr(self, key, value)
        super().__post_init__(**kwargs)
        self.get_text_config().visual_gen = self.visual_gen

    def validate_architecture(self) -> None:
        """Part of the `@strict` validation."""
        _check_sizes(self)
        if self.frequency_embedding_size % 2:
            raise ValueError(f"`frequency_embedding_size` must be even, got {self.frequency_embedding_size}.")
        if self.loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(
                f"`loss_reduction` must be one of {', '.join(LOSS_REDUCTIONS)}, got {shown(self.loss_reduction)}."
            )
        if not (self.visual_gen or self.visual_und):
            raise ValueError("`visual_gen` and `visual_und` are both False: a BAGEL model needs one of its halves.")

    def to_dict(self) -> dict[str, Any]:
        """Like the parent's, without `freeze_und`: the next training of a saved model is to choose by itself."""
        output = super().to_dict()
        output.pop("freeze_und", None)
        output.pop("original_config", None)
        if not output.get("auto_map"):
            output.pop("auto_map", None)
        return output

    correct = correct_config

    @property
    def latent_stride(self) -> int:
        """Pixels per latent token and side."""
        return self.latent_downsample * self.latent_patch_size

    @property
    def latent_dim(self) -> int:
        """Numbers per latent token: `latent_patch_size ** 2 * latent_channels`."""
        return self.latent_patch_size**2 * self.latent_channels

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Like the parent's; an original `config.json` is corrected from the weights and the tokenizer beside it.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id, directory, or file of settings.
            kwargs: As in `from_pretrained`; `base`, another repository or directory, has the settings and the tokenizer
                if this one lacks them. `variant` and `transformers_weights` say which weights are meant.
        """
        path, base = pretrained_model_name_or_path, kwargs.pop("base", None)
        named = kwargs.pop("transformers_weights", None)
        if not os.path.isdir(os.path.join(path, kwargs.get("subfolder") or "")) and os.path.isfile(
            os.path.join(path, "model_index.json")
        ):
            # Where the model lies at the root of a pipeline, diffusers asks in a folder named by it, too.
            kwargs.pop("subfolder")
        check_folder(path, kwargs.get("subfolder") or "")
        hub = hub_arguments(path, kwargs)
        place, place_hub = (path, hub) if os.path.isfile(path) else place_of(path, base, SETTINGS, hub)
        file = place if os.path.isfile(place) else find_file(place, "config.json", **place_hub)
        with nullcontext(place) if file is None else strict_json(file) as readable:
            readable = place if readable == file else readable
            kwargs = {name: value for name, value in kwargs.items() if name not in HUB_ARGUMENTS}
            config_dict, kwargs = super().get_config_dict(readable, **kwargs, **place_hub)
        if "text_config" not in config_dict and not is_original_config(config_dict):
            # The first repositories have llm_config.json and vit_config.json, and no config.json.
            if find_file(place, "llm_config.json", **place_hub) is not None:
                config_dict["llm_config"] = None
            elif not config_dict:
                raise OSError(
                    f"'{place}' has no config.json: it is no BAGEL checkpoint; {contents(place, place_hub)}."
                )
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"`model_type` in the config.json of '{place}' is {shown(config_dict['model_type'])}, expected "
                f"{cls.model_type!r}."
            )
        if is_original_config(config_dict):
            weights, shapes = find_shapes(_place(path), hub, named=named, variant=kwargs.get("variant"))
            if weights is not None:
                config_dict["transformers_weights"] = weights.name
            tokenizer = place_of(_place(path), base, TOKENIZER, hub)
            config_dict = read_original_config(config_dict, _place(place), shapes, tokenizer, **place_hub)
        # `from_dict` is told nothing of where it comes from.
        return config_dict, kwargs | {"_read_from": str(place)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        Like the parent's. `AutoConfig` comes here with the raw JSON and the `name_or_path` of its repository, and has
        dropped the other Hub arguments: a model corrects the original layout's values with its own when it is loaded.
        """
        name = kwargs.get("name_or_path")
        if not name or not is_original_config(config_dict):
            return cls._named_from_dict(config_dict, **kwargs)
        file = os.path.join(name, "config.json") if os.path.isdir(name) else name
        # A `subfolder` is dropped, too.
        if os.path.isfile(file) and read_json(file) == config_dict:
            return cls._named_from_dict(read_original_config(config_dict, _place(name)), **kwargs)
        made = cls._named_from_dict(dict(config_dict), **kwargs)
        (made[0] if isinstance(made, tuple) else made).original_config = config_dict
        if isinstance(made, tuple):
            # Asked by a class that loads a model next.
            return made
        logger.warning_once(
            f"'{name}' has the original layout, whose `config.json` is wrong in places, and `AutoConfig` does not say from "
            "where to correct it. Models do so when they are loaded; for the configuration alone, use "
            "`BagelConfig.from_pretrained`."
        )
        return made

    @classmethod
    def _named_from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The parent's `from_dict`, whose errors name the file and the key."""
        name = kwargs.pop("_read_from", None) or kwargs.get("name_or_path")
        file = f"config.json of '{name}'" if name else "configuration"
        place = ""
        try:
            for key, part in cls.sub_configs.items():
                settings, place = config_dict.get(key), f"in `{key}`, "
                if isinstance(settings, dict):
                    if settings.get("model_type", part.model_type) != part.model_type:
                        raise ValueError(
                            f"`model_type` is {shown(settings['model_type'])}, expected {part.model_type!r}."
                        )
                    _check_library_settings(settings)
                    part(**settings)
                elif settings is not None and not isinstance(settings, part):
                    raise ValueError(f"there is {shown(settings)} instead of an object.")
            place = ""
            _check_library_settings(config_dict)
            return super().from_dict(config_dict, **kwargs)
        except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"The {file} cannot be used: {place}{_reason(error)[:400]}") from error


def _check_library_settings(settings: dict[str, Any]) -> None:
    """Raise a `ValueError` for values that the library reads and does not check."""
    for key in ("dtype", "torch_dtype"):
        value = settings.get(key)
        found = getattr(torch, value, None) if isinstance(value, str) else value
        if value not in (None, "auto") and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(f"`{key}` must be a floating type, got {shown(value)}.")
    for key, kind in (("transformers_weights", str), ("attn_implementation", (str, dict)), ("auto_map", dict)):
        if not isinstance(settings.get(key), (kind, type(None))):
            raise ValueError(f"`{key}` must be of another type than {shown(settings[key])}.")
    rope = settings.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type", "default") not in {"default", *ROPE_INIT_FUNCTIONS}:
        raise ValueError(f"`rope_parameters` must have a `rope_type` of transformers, got {shown(rope['rope_type'])}.")
    theta = settings.get("rope_theta")
    if theta is not None and not (isinstance(theta, (int, float)) and theta > 0):
        raise ValueError(f"`rope_theta` must be a positive number, got {shown(theta)}.")


def _reason(error: BaseException) -> str:
    """What is wrong, without the libraries' names of their checks."""
    while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def _place(path: str | os.PathLike) -> str | os.PathLike:
    """The directory of a file, or the directory or Hub id that it is."""
    return os.path.dirname(path) if os.path.isfile(path) else path


__all__ = ["BagelConfig", "BagelTextConfig", "BagelVisionConfig"]
