# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The classes of this package, and the places where diffusers looks for them."""

import functools
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from transformers_bagel.checkpoints import read_json
from transformers_bagel.files import find_file, hub_arguments
from transformers_bagel.original_config import is_original_config

from .answering import SessionEvent
from .caching import TaylorSeerConfig
from .guidance import BagelGuidance
from .inferencer import InterleaveInferencer
from .loading import VAE_FILES
from .lora import BagelLoraLoaderMixin
from .pipeline_bagel import BagelPipeline
from .pipeline_output import BagelPipelineOutput
from .presets import PRESETS, Preset
from .protocols import PROTOCOLS, InterleaveProtocol
from .session import BagelReply, BagelSession
from .together import send_all


AUTO_PIPELINES = "diffusers.pipelines.auto_pipeline"


def register_pipeline() -> None:
    """Let `DiffusionPipeline` and the AutoPipelines load BAGEL."""
    # A Hub repository names the modules of its components; diffusers loads those that are listed here only.
    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES.setdefault("transformers_bagel.modeling_bagel", {"PreTrainedModel": methods})
    LOADABLE_CLASSES.setdefault("transformers_bagel.processing_bagel", {"ProcessorMixin": methods})
    _lead_here(DiffusionPipeline)
    if AUTO_PIPELINES in sys.modules:
        register_with_auto_pipelines(sys.modules[AUTO_PIPELINES])
    else:
        sys.meta_path.insert(0, _AfterImport())


def register_with_auto_pipelines(auto_pipeline: Any) -> None:
    """Make BAGEL known to a module of diffusers that imports all of its pipelines, and is imported late for that reason."""
    for mapping in (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING):
        mapping.setdefault("bagel", BagelPipeline)
    for chooser in (auto_pipeline.AutoPipelineForText2Image, auto_pipeline.AutoPipelineForImage2Image):
        _lead_here(chooser)


class _AfterImport(MetaPathFinder):
    """Finds the module of the AutoPipelines as Python does, and registers BAGEL there when somebody has imported it."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != AUTO_PIPELINES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            register_with_auto_pipelines(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _lead_here(chooser: Any) -> None:
    """
    Let a class of the library that chooses a pipeline by the name in model_index.json find ours.

    `DiffusionPipeline` looks such names up among the library's own, and has no registry. The AutoPipelines have one, but
    read no name where a repository brings code along; and the original layout has no model_index.json.
    """
    choose = vars(chooser)["from_pretrained"].__func__

    @functools.wraps(choose)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        # The only one that runs what it finds.
        runs_code = chooser is DiffusionPipeline and kwargs.get("trust_remote_code", False)
        if cls is chooser and _is_ours(pretrained_model_name_or_path, kwargs, runs_code):
            return BagelPipeline.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return choose(cls, pretrained_model_name_or_path, **kwargs)

    chooser.from_pretrained = classmethod(from_pretrained)


def _is_ours(path: str | os.PathLike, kwargs: dict[str, Any], runs_code: bool) -> bool:
    """Whether a folder or repository holds BAGEL, and no code that is to run instead."""
    if kwargs.get("custom_pipeline") is not None:
        return False
    try:
        hub = hub_arguments(path, kwargs)
        if (index := find_file(path, "model_index.json", **hub)) is None:
            config = find_file(path, "config.json", **hub)
            return (
                config is not None
                and is_original_config(read_json(config))
                and any(find_file(path, name, **hub) is not None for name in VAE_FILES)
            )
        name = read_json(index).get("_class_name")
    except (OSError, ValueError):
        # The library tells what is wrong.
        return False
    if isinstance(name, list):
        return name[-1:] == [BagelPipeline.__name__] and not runs_code
    return name == BagelPipeline.__name__


register_pipeline()

__all__ = [
    "PRESETS",
    "PROTOCOLS",
    "BagelGuidance",
    "BagelLoraLoaderMixin",
    "BagelPipeline",
    "BagelPipelineOutput",
    "BagelReply",
    "BagelSession",
    "InterleaveInferencer",
    "InterleaveProtocol",
    "Preset",
    "SessionEvent",
    "TaylorSeerConfig",
    "send_all",
]
