"""The versions that pyproject.toml allows are those that the tests have seen."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Of which something is imported where it is asked for.
EXTRAS = ("peft", "quantization", "serve", "demo")
REQUIREMENTS = {
    canonicalize_name(item.name): item
    for item in map(
        Requirement,
        [*PROJECT["dependencies"], *(item for name in EXTRAS for item in PROJECT["optional-dependencies"][name])],
    )
}
PINS = {
    canonicalize_name(name): Version(version)
    for name, _, version in (
        line.partition("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split("\n")
    )
    if version and not name.startswith("#")
}
# diffusers asks for the first where it is there; it comes with the machine. The others ask for us.
OPTIONAL = {"torch_xla", "lm_eval", "lmms_eval", "vlmeval"}


def imported_modules() -> set[str]:
    """The top-level modules that `src/` imports, anywhere in its files, and that are neither Python's nor ours."""
    nodes = [
        node for file in ROOT.glob("src/**/*.py") for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    ours = {folder.name for folder in (ROOT / "src").iterdir()}
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - ours - OPTIONAL


def bounds(name: str) -> dict[str, Version]:
    return {item.operator: Version(item.version) for item in REQUIREMENTS[name].specifier}


def test_every_import_has_a_lower_bound():
    distributions = importlib.metadata.packages_distributions()
    modules = imported_modules()
    assert {"torch", "PIL", "peft"} <= modules
    for module in modules:
        names = {canonicalize_name(name) for name in distributions[module]}
        assert any(">=" in bounds(name) for name in names & REQUIREMENTS.keys()), module


@pytest.mark.parametrize("name", ["transformers", "diffusers", "peft"])
def test_upper_bound_is_the_next_minor_release_of_what_is_tested(name):
    major, minor = PINS[name].release[:2]
    assert bounds(name)["<"] == Version(f"{major}.{minor + 1}")


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_pin_lies_within_the_bounds(name):
    assert REQUIREMENTS[name].specifier.contains(PINS[name])


def test_extras_repeat_no_library_with_other_bounds():
    lines = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for item in map(Requirement, lines):
        known = REQUIREMENTS.get(canonicalize_name(item.name))
        assert known is None or known.specifier == item.specifier
