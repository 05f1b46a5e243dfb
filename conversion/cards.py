# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a card may take over from the card of its source."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from yaml import YAMLError


# Sections that stay true of converted weights.
CARRIED = re.compile(r"benchmark|evaluation|results|training", re.IGNORECASE)
# Entries of the metadata that do.
METADATA = ("license", "license_name", "license_link", "language", "datasets")


@dataclass(frozen=True)
class KnownFacts:
    """
    What the source's own card says.

    Attributes:
        metadata (`dict[str, Any]`): Licence, languages, data.
        results (`list[EvalResult]`): Of evaluations, as the Hub shows them.
        sections (`str`): Markdown about training and evaluation.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    results: list[EvalResult] = field(default_factory=list)
    sections: str = ""


def known_facts(card: Path | None) -> KnownFacts:
    """What the card of a source says of its training and its evaluation. One that cannot be read is left out, with a
    warning: the weights are what matters.
    """
    if card is None:
        return KnownFacts()
    try:
        loaded = ModelCard.load(card, ignore_metadata_errors=True)
    except (ValueError, YAMLError) as error:
        print(f"warning: '{card}' cannot be read, and nothing is taken over from it ({error}).", file=sys.stderr)
        return KnownFacts()
    metadata = loaded.data.to_dict()
    return KnownFacts(
        {name: metadata[name] for name in METADATA if name in metadata},
        loaded.data.eval_results or [],
        carried_sections(loaded.text),
    )


def carried_sections(text: str) -> str:
    """The sections of the second level whose titles are about training or evaluation."""
    sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return "\n\n".join(section.strip() for section in sections if CARRIED.search(section.splitlines()[0]))


def public_name(source: str) -> str:
    """What a card calls a source: its Hub id, or the name of its folder or file, whose place is nobody's business."""
    return Path(source).resolve().name if Path(source).exists() else source
