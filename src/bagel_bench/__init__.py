# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Pictures of benchmarks, in the layouts that their scorers expect (docs/evaluation.md). Importing this loads no library."""

from .benchmarks import BENCHMARKS, Benchmark, Picture, read_pictures


__all__ = ["BENCHMARKS", "Benchmark", "Picture", "read_pictures"]
