# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL's model and processor are in the package transformers-bagel; this file leads transformers' Auto classes there."""

try:
    import transformers_bagel as package
except ImportError as error:
    raise ImportError(
        "This repository needs a package that cannot be imported: `pip install transformers-bagel`."
    ) from error

BagelConfig = package.BagelConfig
BagelForConditionalGeneration = package.BagelForConditionalGeneration
BagelImageProcessor = package.BagelImageProcessor
BagelModel = package.BagelModel
BagelProcessor = package.BagelProcessor
