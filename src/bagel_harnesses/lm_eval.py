# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The command line of lm-evaluation-harness, whose `hf-multimodal` and `hf` then know BAGEL: `python -m bagel_harnesses.lm_eval`."""

import gc

from lm_eval.__main__ import cli_evaluate

import transformers_bagel  # noqa: F401  so that transformers' automatic classes know it


def main() -> None:
    """The harness' own command."""
    # It collects garbage after every batch, and would look through all that was imported each time: seconds.
    gc.collect()
    gc.freeze()
    cli_evaluate()


if __name__ == "__main__":
    main()
