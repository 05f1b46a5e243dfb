# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`python -m diffusers_bagel` is another name of `bagel`."""

import sys

from bagel_cli import main


__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
