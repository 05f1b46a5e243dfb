# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The classes of this package, and the places where diffusers looks for them."""

from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from transformers.utils import logging as transformers_logging

from .caching import TaylorSeerConfig
from .guidance import BagelGuidance
from .lora import BagelLoraLoaderMixin
from .pipeline_bagel import BagelPipeline
from .pipeline_output import BagelPipelineOutput


def _register() -> None:
    # A Hub repository names the modules of its components; diffusers loads those that are listed here only.
    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES.setdefault("transformers_bagel.modeling_bagel", {"PreTrainedModel": methods})
    LOADABLE_CLASSES.setdefault("transformers_bagel.processing_bagel", {"ProcessorMixin": methods})
    # This imports every pipeline, and transformers would warn about torchvision, which some of them want.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    transformers_logging.set_verbosity(verbosity)
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING.setdefault("bagel", BagelPipeline)


_register()

__all__ = ["BagelGuidance", "BagelLoraLoaderMixin", "BagelPipeline", "BagelPipelineOutput", "TaylorSeerConfig"]
