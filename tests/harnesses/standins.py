"""What stands in for a harness that is not installed: the few classes that ours are built on. scripts/harnesses.sh has the real ones."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any


class lmms:  # noqa: N801  the harness' own name
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict[str, Any]

    @property
    def args(self) -> tuple:
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class BaseModel:
    def set_dump_image(self, function: Any) -> None:
        self.dump_image_func = function

    def dump_image(self, line: Any, dataset: str) -> Any:
        return self.dump_image_func(line)

    def generate(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        return self.generate_inner(message, dataset)

    def chat(self, messages: list[dict[str, Any]], dataset: str | None = None) -> str:
        return self.chat_inner(messages, dataset=dataset)


STANDINS = {
    "lmms_eval.api.model": {"lmms": lmms},
    "lmms_eval.api.instance": {"Instance": Instance},
    "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    "vlmeval.vlm.base": {"BaseModel": BaseModel},
}


def missing_modules() -> dict[str, ModuleType]:
    """Modules with the stand-ins, and the packages around them, for `sys.modules`."""
    modules: dict[str, ModuleType] = {}
    for name, contents in STANDINS.items():
        if importlib.util.find_spec(name.partition(".")[0]) is not None and name.partition(".")[0] not in modules:
            continue
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(module).update(contents)
    return {name: module for name, module in modules.items() if name not in sys.modules}
