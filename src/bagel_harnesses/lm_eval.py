# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The command line of lm-evaluation-harness, whose `hf-multimodal` and `hf` then know BAGEL: `python -m bagel_harnesses.lm_eval`."""

from lm_eval.__main__ import cli_evaluate

import transformers_bagel  # noqa: F401  so that transformers' automatic classes know it


if __name__ == "__main__":
    cli_evaluate()
