# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Repositories that lead the library here with `trust_remote_code=True`: what is saved afterwards holds no code."""

from typing import Any


class InstalledCodeMixin:
    """For the classes that the library would mark as code of a repository, to be copied wherever they are saved."""

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Like the parent's for classes outside this package. Those inside stay what they are: installed code."""
        if cls.__module__.split(".")[0] != __name__.split(".")[0]:
            super().register_for_auto_class(*args, **kwargs)  # type: ignore[misc]  # of the class beside this mixin
