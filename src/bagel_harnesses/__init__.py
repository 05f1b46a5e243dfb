# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL in evaluation harnesses: lmms-eval finds it by its entry point, VLMEvalKit takes one class."""

from typing import Any


def lmms_eval_model() -> Any:
    """What lmms-eval's entry point `lmms_eval.models` gives: where it finds the model `bagel_hf`."""
    # Nothing of a model is imported here, since lmms-eval asks this in every run, of any model.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="bagel_hf", chat_class_path="bagel_harnesses.lmms_eval.BagelHF")
