# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`bagel serve --ray`: several replicas of the server, until the process is told to end."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import ray
from ray.serve.config import AutoscalingConfig

from bagel_server import Engine
from bagel_server.on_ray import application, cluster, run
from diffusers_bagel import BagelPipeline

from .files import CommandError
from .serving import settings_of


Loaded = Callable[[], AbstractContextManager[BagelPipeline]]


def serve(loaded: Loaded, options: argparse.Namespace) -> None:
    """
    Serve a model by replicas. Told to end, by SIGTERM or Ctrl-C, they take nothing new and finish what runs.

    Args:
        loaded: Loads the pipeline, in the process of a replica.
        options (`argparse.Namespace`): Of the command line.

    Raises:
        CommandError: if it cannot work, or no replica starts.
    """
    settings = settings_of(options)
    most = options.max_replicas or options.replicas
    if most < options.replicas:
        raise CommandError(f"--max-replicas must be at least --replicas, {options.replicas}, got {most}.")
    if options.port == 0:
        raise CommandError("--ray needs a --port, at which each machine of the cluster listens.")
    if os.path.isdir(os.path.expanduser(options.model)):
        # Replicas may start in another folder.
        options.model = os.path.abspath(os.path.expanduser(options.model))
    replicas = AutoscalingConfig(
        min_replicas=options.replicas,
        max_replicas=most,
        # One more starts when those that are there are half full.
        target_ongoing_requests=max(1, options.max_running // 2),
    )
    with cluster(max(most, os.cpu_count() or 1)):
        device = options.device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")
        engine = partial(running_engine, loaded, options.max_running, options.max_waiting)
        app = application(engine, settings, replicas, num_gpus=float(device.startswith("cuda")))
        try:
            run(app, options.host, options.port)
        except RuntimeError as error:
            raise CommandError(f"no replica could start: {error}") from error


@contextmanager
def running_engine(loaded: Loaded, max_running: int, max_waiting: int) -> Iterator[Engine]:
    """The engine of a replica, which finishes what runs when the block ends."""
    with loaded() as pipe:
        pipe.set_progress_bar_config(disable=True)
        engine = Engine(pipe, max_running, max_waiting)
        try:
            yield engine
        finally:
            engine.close()
