# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`bagel serve --ray`: several replicas of the server, until the process is told to end."""

from __future__ import annotations

import argparse
import os
from functools import partial

import ray
from ray.serve.config import AutoscalingConfig

from bagel_server.on_ray import application, cluster, run

from .files import CommandError
from .serving import running_engine, settings_of


def serve(options: argparse.Namespace) -> None:
    """
    Serve a model by replicas. Told to end (SIGTERM, or Ctrl-C), they take nothing new and finish what runs.

    Raises:
        CommandError: if it cannot work, or no replica starts.
    """
    settings = settings_of(options)
    most = options.max_replicas or options.replicas
    if most < options.replicas:
        raise CommandError(f"--max-replicas must be at least --replicas, {options.replicas}, got {most}.")
    if options.port == 0:
        raise CommandError("--ray needs a --port, as each machine of a cluster listens at it.")
    if os.path.isdir(os.path.expanduser(options.model)):
        # Replicas start elsewhere.
        options.model = os.path.abspath(os.path.expanduser(options.model))
    replicas = AutoscalingConfig(
        min_replicas=options.replicas,
        max_replicas=most,
        # Another one starts when those there are half full.
        target_ongoing_requests=max(1, options.max_running // 2),
    )
    with cluster(max(most, os.cpu_count() or 1)):
        device = options.device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")
        app = application(
            partial(running_engine, options), settings, replicas, num_gpus=float(device.startswith("cuda"))
        )
        try:
            run(app, options.host, options.port)
        except RuntimeError as error:
            raise CommandError(f"no replica could start: {error}") from error
