# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What pyproject.toml allows of the libraries that the package imports: `python scripts/bounds.py lowest|names|beyond`."""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parent.parent


def requirements() -> list[Requirement]:
    """What the package needs, and what its extra `peft` does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["peft"]]


def pins() -> list[Requirement]:
    """The versions of `constraints.txt`."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def bound(requirement: Requirement, operator: str) -> str | None:
    """The version after `operator`, `">="` or `"<"`, or `None`."""
    return next((item.version for item in requirement.specifier if item.operator == operator), None)


def lowest() -> list[str]:
    """The pins, with the lower bounds in place of those of the libraries."""
    lower = {canonicalize_name(item.name): f"{item.name}=={bound(item, '>=')}" for item in requirements()}
    return [lower.get(canonicalize_name(pin.name), str(pin)) for pin in pins()]


def names() -> list[str]:
    """The libraries without their bounds."""
    return [item.name for item in requirements()]


def beyond() -> list[str]:
    """The installed libraries that the bounds shut out, as `name==version`."""
    return [
        f"{item.name}=={version(item.name)}"
        for item in requirements()
        if not item.specifier.contains(version(item.name), prereleases=True)
    ]


if __name__ == "__main__":
    print("\n".join({"lowest": lowest, "names": names, "beyond": beyond}[sys.argv[1]]()))
