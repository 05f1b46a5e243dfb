"""`bagel serve --ray`, before a cluster is started."""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import nullcontext

import pytest

from bagel_cli import main

from .conftest import NO_RAY, ROOT, SHAPES


SERVE = ["serve", "--model", str(SHAPES), "--ray"]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_it_says_what_to_install(capsys):
    assert main(SERVE) == 2
    assert "pip install 'transformers-bagel[ray]'" in capsys.readouterr().err


class TestWithRay:
    @pytest.fixture(autouse=True)
    def ray(self):
        return pytest.importorskip("ray", reason=NO_RAY)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--replicas", "3", "--max-replicas", "2"], "--max-replicas must be at least --replicas, 3, got 2"),
            (["--replicas", "0"], "--replicas: must be a whole number from 1, got '0'"),
            (["--port", "0"], "--ray needs a --port"),
        ],
        ids=["fewer_at_most", "none", "no_port"],
    )
    def test_what_cannot_work_is_told_before_a_cluster_is_started(self, options, message, capsys):
        assert main([*SERVE, *options]) == 2
        assert message in capsys.readouterr().err

    def test_the_builder_for_rays_own_commands_has_the_key(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "examples")
        serve_ray = importlib.import_module("serve_ray")
        made = []
        monkeypatch.setattr(serve_ray, "application", lambda engine, settings, *_: made.append(settings.api_key))
        monkeypatch.setenv("BAGEL_API_KEY", "secret")
        serve_ray.build({"model": str(SHAPES)})
        monkeypatch.delenv("BAGEL_API_KEY")
        serve_ray.build({"model": str(SHAPES)})
        assert made == ["secret", None]

    @pytest.mark.parametrize(("gpus", "device", "each"), [(0, [], 0), (8, [], 1), (8, ["--device", "cpu"], 0)])
    def test_each_replica_has_a_gpu_if_there_are_any(self, gpus, device, each, ray, monkeypatch):
        from bagel_cli import serving_on_ray

        made, where = [], []
        application = serving_on_ray.application
        monkeypatch.setattr(serving_on_ray, "cluster", lambda num_cpus: nullcontext())
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0} | ({"GPU": float(gpus)} if gpus else {}))
        monkeypatch.setattr(serving_on_ray, "run", lambda app, host, port: where.append((host, port)))
        monkeypatch.setattr(
            serving_on_ray,
            "application",
            lambda *args, **kwargs: made.append((args, kwargs)) or application(*args, **kwargs),
        )
        assert (
            main([*SERVE, "--replicas", "2", "--max-replicas", "4", "--name", "shapes", "--port", "8080", *device])
            == 0
        )
        ((_, settings, replicas), resources), *others = made
        assert (settings.model, replicas.min_replicas, replicas.max_replicas) == ("shapes", 2, 4)
        assert replicas.target_ongoing_requests == 16
        assert (resources, others, where) == ({"num_gpus": each}, [], [("127.0.0.1", 8080)])
