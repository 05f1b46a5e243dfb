# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a process has to tell, line by line, so that it is known if the process ends before its time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Lines:
    """
    A file of JSON objects.

    Args:
        file (`Path`, *optional*): Written to; without it nothing is.
    """

    def __init__(self, file: Path | None):
        self.file = file

    def write(self, **fields: Any) -> None:
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(fields) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        if self.file is None or not self.file.exists():
            return []
        *whole, _ = self.file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in whole]
