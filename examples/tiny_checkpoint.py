# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Write the tests' tiny model as a repository of its own: `python examples/tiny_checkpoint.py FOLDER`.

It has BAGEL's architecture and 0.35 million random weights, so every command runs on it in a second; what it draws is
noise and what it says is nonsense.
"""

import argparse
import json
from pathlib import Path

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelProcessor


GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where to write the repository")
    folder = parser.parse_args().folder
    cases = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
    sizes = {
        name: {"longest_edge": transform[0], "shortest_edge": transform[1]}
        for name, transform in (("size", cases["vit_transform"]), ("vae_size", cases["vae_transform"]))
    }
    processor = BagelProcessor.from_pretrained(GOLDEN / "checkpoint", **sizes)
    BagelPipeline.from_pretrained(GOLDEN / "checkpoint", processor=processor).save_pretrained(folder)


if __name__ == "__main__":
    main()
