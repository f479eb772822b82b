"""``deploy/ray_serve.py``: the deployment, in this process; and what replicas cannot share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from micro_systems import system
from safelight.errors import InvalidRequest
from safelight.generate import Generator
from safelight.serve import house as houses

ROOT = Path(__file__).parents[2]


@pytest.fixture
def deploy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, over a toy model."""
    monkeypatch.syspath_prepend(ROOT / "deploy")
    monkeypatch.setattr(houses, "load", lambda *_, **__: Generator(system("sd-v1").model))
    import ray_serve

    yield ray_serve
    sys.modules.pop("ray_serve", None)


BODY = {"prompt": "a red cube", "num_inference_steps": 2, "seed": 7}


def test_the_deployment_answers_and_is_healthy(deploy: Any) -> None:
    from ray import serve

    made = deploy.app({"model": "toy", "max_steps": "9", "replicas": "2", "cpus": "0.5"})
    deployment = made._bound_deployment
    assert deployment.num_replicas == 2
    assert deployment.ray_actor_options["num_cpus"] == 0.5
    handle = serve.run(made, _local_testing_mode=True)
    assert handle.check_health.remote().result() is None


def test_a_replica_is_the_server(deploy: Any) -> None:
    settings, _, _ = deploy.read({"model": "toy,other", "drain_seconds": "1"})
    assert settings.models == ("toy", "other")
    with TestClient(deploy.application(settings)) as client:
        assert client.get("/readyz").status_code == 200  # loaded before it takes requests
        made = client.post("/v1/images/generations", json=BODY)
        assert made.status_code == 200, made.text
        assert client.post("/v1/jobs", json={"prompt": "a", "steps": 1}).status_code == 202
        with pytest.raises(RuntimeError, match="not loaded"):
            deploy.healthy(houses.House(settings))


def test_what_one_process_remembers_is_refused_by_many(deploy: Any) -> None:
    settings, _, _ = deploy.read({"model": "toy", "drain_seconds": "1"})
    with TestClient(deploy.application(settings, replicas=2)) as client:
        assert client.post("/v1/images/generations", json=BODY).status_code == 200
        for path in ("/v1/jobs", "/v1/jobs/x/events", "/sdapi/v1/progress"):
            refused = client.get(path)
            assert refused.status_code == 501
            assert "replicas=1" in refused.text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"modell": "x"}, "modell: is no setting"),
        ({"replicas": "two"}, "Write numbers"),
        ({"replicas": 0}, "at least 1"),
        ({"live": "many"}, "settings"),
    ],
)
def test_arguments(deploy: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        deploy.read(given)
