"""The pipeline of the tiny checkpoint, as the tests of the pipeline have it."""

from tests.diffusers_bagel.conftest import forwards, own_pipe, pipe


__all__ = ["forwards", "own_pipe", "pipe"]
