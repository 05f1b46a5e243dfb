# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL for transformers: importing this package registers it with the library's Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto import modeling_auto

from .adapters import LORA_TARGETS, register_adapter_targets
from .assisting import ForwardCounter
from .cache import GrowingCache, PrefixBuffer, PrefixCache, PrefixView, fork_cache
from .checkpoints import WEIGHT_RENAMINGS
from .configuration_bagel import BagelConfig, BagelTextConfig, BagelVisionConfig
from .context_parallel import SplitPrefixCache
from .image_processing_bagel import BagelImageProcessor
from .modeling_bagel import (
    BagelForConditionalGeneration,
    BagelModel,
    BagelOutput,
    BagelPreTrainedModel,
    BagelTextModel,
    BagelVisionModel,
)
from .processing_bagel import BagelProcessor
from .training.collator import BagelDataCollator
from .training.data_loader import BagelDataLoader
from .training.losses import loss_totals


__version__ = "0.1.0"


def _register() -> None:
    for config in (BagelConfig, BagelTextConfig, BagelVisionConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(BagelConfig, BagelModel, exist_ok=True)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(BagelConfig, BagelForConditionalGeneration, exist_ok=True)
    # By these names, and not by what is registered, `transformers serve` and others tell what a model can do.
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        names[BagelConfig.model_type] = BagelForConditionalGeneration.__name__
    AutoImageProcessor.register(BagelConfig, image_processor_classes={"pil": BagelImageProcessor}, exist_ok=True)
    AutoProcessor.register(BagelConfig, BagelProcessor, exist_ok=True)
    register_checkpoint_conversion_mapping(
        BagelConfig.model_type, [WeightRenaming(*pair) for pair in WEIGHT_RENAMINGS], overwrite=True
    )
    register_adapter_targets()


_register()

__all__ = [
    "LORA_TARGETS",
    "BagelConfig",
    "BagelDataCollator",
    "BagelDataLoader",
    "BagelForConditionalGeneration",
    "BagelImageProcessor",
    "BagelModel",
    "BagelOutput",
    "BagelPreTrainedModel",
    "BagelProcessor",
    "BagelTextConfig",
    "BagelTextModel",
    "BagelVisionConfig",
    "BagelVisionModel",
    "ForwardCounter",
    "GrowingCache",
    "PrefixBuffer",
    "PrefixCache",
    "PrefixView",
    "SplitPrefixCache",
    "fork_cache",
    "loss_totals",
]
