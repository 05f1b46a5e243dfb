# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The command line of transformers, which then knows BAGEL: `python -m transformers_bagel serve FOLDER`."""

from transformers.cli.transformers import main


if __name__ == "__main__":
    main()
