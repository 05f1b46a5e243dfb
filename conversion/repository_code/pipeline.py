# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL's pipeline is in the package transformers-bagel; this file leads diffusers' `DiffusionPipeline` there."""

try:
    # Not `from diffusers_bagel import`: diffusers would advise to install a package of that name, if it is missing.
    import diffusers_bagel as package
except ImportError as error:
    raise ImportError(
        "This repository needs a package that cannot be imported: `pip install transformers-bagel`."
    ) from error

BagelPipeline = package.BagelPipeline
