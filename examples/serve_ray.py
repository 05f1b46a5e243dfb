# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The server on Ray Serve, as a builder that Ray's own commands and config files take.

    python examples/serve_ray.py model=examples/shapes/checkpoint dtype=float32 max_replicas=2
    PYTHONPATH=examples serve run serve_ray:build model=ByteDance-Seed/BAGEL-7B-MoT num_gpus=1 min_replicas=2 max_replicas=8

In a config file of `serve deploy`, or of KubeRay, the second is `import_path: serve_ray:build` with these names under `args`.
With the variable BAGEL_API_KEY, where this is run, requests must bear the key. `bagel serve --ray` does the same from the command
line. Copy this file to load the model otherwise: with adapters, quantised, on
more than one GPU. See docs/ray.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel
from ray import serve
from ray.serve.config import AutoscalingConfig

from bagel_server import Engine, ServerSettings
from bagel_server.on_ray import application, cluster, run
from diffusers_bagel import BagelPipeline


class Arguments(BaseModel):
    """Of [`build`], by name. The last two are those of `python examples/serve_ray.py`; Ray's commands have their own."""

    model: str = "ByteDance-Seed/BAGEL-7B-MoT"
    name: str = "bagel"
    dtype: str = "bfloat16"
    num_cpus: float = 1
    num_gpus: float = 0
    min_replicas: int = 1
    max_replicas: int = 1
    # A replica more is started when those that are there have more requests than this each, for so many seconds.
    target_ongoing_requests: float = 16
    upscale_delay_s: float = 30
    look_back_period_s: float = 30
    host: str = "127.0.0.1"
    port: int = 8000


@contextmanager
def engine(args: Arguments) -> Iterator[Engine]:
    """The engine of a replica, which finishes what runs when the replica is to go."""
    pipe = BagelPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    running = Engine(pipe.to("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        yield running
    finally:
        running.close()


def build(given: dict[str, Any]) -> serve.Application:
    """The application, by what is written behind `serve_ray:build`, or under `args` in a config file."""
    args = Arguments.model_validate(given)
    replicas = AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        target_ongoing_requests=args.target_ongoing_requests,
        upscale_delay_s=args.upscale_delay_s,
        look_back_period_s=args.look_back_period_s,
    )
    settings = ServerSettings(model=args.name, api_key=os.environ.get("BAGEL_API_KEY"))
    return application(partial(engine, args), settings, replicas, args.num_cpus, args.num_gpus)


if __name__ == "__main__":
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    arguments = Arguments.model_validate(words)
    with cluster(max(2, arguments.max_replicas)):
        run(build(words), arguments.host, arguments.port)
