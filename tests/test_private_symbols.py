"""The libraries' private symbols that this project uses are all listed in docs/private_symbols.md, and still there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.hooks import group_offloading
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.pipelines import pipeline_loading_utils
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_backends import PilBackend

import diffusers_bagel
import transformers_bagel


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "private_symbols.md").read_text(encoding="utf-8")
LIBRARIES = ("transformers", "diffusers", "peft", "accelerate", "safetensors", "huggingface_hub", "torch")

PARTS = {
    "PreTrainedModel": PreTrainedModel,
    "PreTrainedConfig": PreTrainedConfig,
    "GenerationMixin": GenerationMixin,
    "PilBackend": PilBackend,
    "DiffusionPipeline": diffusers.DiffusionPipeline,
    "LoraBaseMixin": LoraBaseMixin,
    "OptimizedModule": torch._dynamo.OptimizedModule,
}


def internal_symbols() -> list[str]:
    table = PAGE.split("## Internal")[1].split("## The protocols")[0]
    return re.findall(r"^\| `([\w.]+)` \|", table, flags=re.MULTILINE)


def protocol_symbols() -> list[tuple[str, str]]:
    """Class and attribute of each cell such as "`PreTrainedModel._init_weights`, `._from_config`"."""
    symbols, owner = [], ""
    for name in re.findall(r"`([\w.]+)`", PAGE.split("## The protocols")[1]):
        first, _, attribute = name.rpartition(".")
        owner = first or owner
        if attribute and owner in PARTS and "." in name:
            symbols.append((owner, attribute))
    return symbols


def test_at_most_eight_internal_symbols_are_used():
    assert 0 < len(internal_symbols()) <= 8


@pytest.mark.parametrize("name", internal_symbols())
def test_an_internal_symbol_is_still_there(name):
    module, _, attribute = name.rpartition(".")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:
        package, _, cls = module.rpartition(".")
        owner = getattr(importlib.import_module(package), cls)
    assert hasattr(owner, attribute), f"{name} is gone: see docs/private_symbols.md for what needs it."


@pytest.mark.parametrize(("owner", "attribute"), protocol_symbols())
def test_a_protocol_attribute_is_still_known(owner, attribute):
    cls = PARTS[owner]
    known = hasattr(cls, attribute) or attribute in inspect.getsource(inspect.getmodule(cls))
    assert known, f"{owner}.{attribute} is gone: see docs/private_symbols.md."


@pytest.mark.parametrize(
    ("attribute", "readers"),
    [
        ("_skip_keys", [group_offloading, pipeline_loading_utils]),
        ("_group_offload_block_modules", [group_offloading]),
        ("_guidance_scale", [diffusers.callbacks]),
    ],
)
def test_the_library_still_reads_what_a_module_says_of_itself(attribute, readers):
    for reader in readers:
        assert attribute in inspect.getsource(reader), f"{reader.__name__} no longer reads {attribute}."


def sources() -> list[Path]:
    return sorted((ROOT / "src").rglob("*.py"))


def test_no_other_private_name_is_imported():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
                for alias in node.names:
                    if alias.name.startswith("_"):
                        assert f"{node.module}.{alias.name}" in internal_symbols(), f"{path.name}: {alias.name}"


def test_no_other_private_method_is_overridden():
    own = (transformers_bagel, diffusers_bagel)
    classes = {
        cls
        for package in own
        for path in (Path(package.__file__).parent).rglob("*.py")
        if path.stem not in ("__init__", "__main__")
        for cls in vars(
            importlib.import_module(
                ".".join([package.__name__, *path.relative_to(Path(package.__file__).parent).with_suffix("").parts])
            )
        ).values()
        if inspect.isclass(cls) and cls.__module__.split(".")[0] in (package.__name__ for package in own)
    }
    listed = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", PAGE)}
    for cls in classes:
        for name in vars(cls):
            is_private = name.startswith("_") and not name.startswith("__") and name != "_abc_impl"
            if is_private and any(
                name in vars(base) for base in cls.__mro__[1:] if base.__module__.split(".")[0] in LIBRARIES
            ):
                assert name in listed, f"{cls.__name__}.{name} overrides a private symbol that no page lists."
