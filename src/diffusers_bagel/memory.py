# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Less memory for the pipeline: offloading that is announced, layerwise casting, quantised components."""

from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, PipelineQuantizationConfig
from diffusers.hooks import HookRegistry
from diffusers.hooks.layerwise_casting import _PEFT_AUTOCAST_DISABLE_HOOK
from diffusers.pipelines.pipeline_loading_utils import _maybe_warn_for_wrong_component_in_quant_config
from diffusers.quantizers.quantization_config import QuantizationConfigMixin as DiffusersQuantizationConfig
from diffusers.utils import logging


logger = logging.get_logger(__name__)


class BagelMemoryMixin(DiffusionPipeline):
    """diffusers' ways of offloading, which tell what they do, and layerwise casting of a transformer that is not diffusers'."""

    transformer: Any
    _announced_offload: tuple[str, Any] | None = None

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """See [`DiffusionPipeline.enable_model_cpu_offload`]."""
        super().enable_model_cpu_offload(gpu_id, device)
        self._announce_offload("one model at a time", self._offload_device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """See [`DiffusionPipeline.enable_sequential_cpu_offload`]."""
        super().enable_sequential_cpu_offload(gpu_id, device)
        self._announce_offload("one layer at a time", self._offload_device)

    def enable_group_offload(self, onload_device: torch.device | str, *args: Any, **kwargs: Any) -> None:
        """See [`DiffusionPipeline.enable_group_offload`]."""
        onload_device = torch.device(onload_device)
        super().enable_group_offload(onload_device, *args, **kwargs)
        self._announce_offload("a group of layers at a time", onload_device)

    def _announce_offload(self, how: str, device: torch.device) -> None:
        # The library enables offloading by model again after every call.
        if self._announced_offload != (how, device):
            self._announced_offload = (how, device)
            logger.warning(
                f"Offloading: weights go to {device} {how} when they are needed, and back, which saves memory and takes time."
            )

    def enable_layerwise_casting(self, storage_dtype: torch.dtype = torch.float8_e4m3fn) -> None:
        """
        Keep the transformer's layers in a small type, and cast each to the transformer's own type while it computes. The
        layers around latents, the connector, norms, embeddings, the text head and adapters stay as they are. It cannot be
        undone.

        Args:
            storage_dtype (`torch.dtype`, *optional*, defaults to `torch.float8_e4m3fn`): Of the layers at rest.

        Raises:
            ValueError: if the transformer is quantised.
        """
        if getattr(self.transformer, "is_quantized", False):
            raise ValueError("The transformer is quantised: its layers are small already, and are not cast.")
        # The library's method needs a module and the names to skip, which the transformer has.
        ModelMixin.enable_layerwise_casting(self.transformer, storage_dtype)
        # It takes adapters for layers of the model's type. Ours are float32, and peft has to cast what they get.
        hooks = HookRegistry.check_if_exists_or_initialize(self.transformer)
        hooks.remove_hook(_PEFT_AUTOCAST_DISABLE_HOOK, recurse=True)


def pipeline_quantization(config: Any) -> PipelineQuantizationConfig:
    """
    Args:
        config (`PipelineQuantizationConfig` or `transformers.utils.quantization_config.QuantizationConfigMixin`):
            Of a pipeline, or of its transformer.

    Raises:
        ValueError: if it is neither, or asks for a quantised transformer in diffusers' words.
    """
    if not isinstance(config, PipelineQuantizationConfig):
        config = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    if isinstance((config.quant_mapping or {}).get("transformer"), DiffusersQuantizationConfig):
        raise ValueError(
            "`quantization_config`: the transformer is a model of transformers. Import its configuration from "
            "`transformers`, not from `diffusers`."
        )
    return config


def published_quantization(config: PipelineQuantizationConfig) -> Any:
    """
    What a pipeline's `quantization_config` says of the transformer of a published repository.

    Returns:
        `transformers.utils.quantization_config.QuantizationConfigMixin`, or `None`.

    Raises:
        ValueError: if the VAE is to be quantised, which is no repository of diffusers there.
    """
    if config._resolve_quant_config(module_name="vae") is not None:
        raise ValueError(
            'The VAE of the published layout cannot be quantised. Pass `components_to_quantize=["transformer"]`.'
        )
    _maybe_warn_for_wrong_component_in_quant_config({"transformer": None, "vae": None}, config)
    return config._resolve_quant_config(is_diffusers=False, module_name="transformer")
