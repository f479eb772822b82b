"""What ``/openapi.json`` says is true: its examples work, its errors look as described."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from PIL import Image

from micro_models import MICRO, micro_model
from safelight.generate import Generator
from safelight.request import GenerateRequest
from safelight.serve.app import create_app
from safelight.serve.house import House, Settings
from serving_micro import Client, serving, toy_house


def side_of(data: bytes | str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data)).size


PATH = {"/v1/inference/{model}": "/v1/inference/toy"}


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    with serving(toy_house()) as client:
        yield client


def described() -> dict[str, Any]:
    return create_app(house=toy_house()).openapi()


SPEC = described()
BODIES = {
    path: post["post"]["requestBody"]["content"]["application/json"]
    for path, post in SPEC["paths"].items()
    if "application/json" in post.get("post", {}).get("requestBody", {}).get("content", {})
}
EXAMPLES = [
    (path, name, example["value"])
    for path, content in BODIES.items()
    for name, example in content["examples"].items()
]
GENERATING = (
    *("/v1/jobs", "/v1/images/generations", "/v1/inference/{model}", "/score"),
    *("/sdapi/v1/txt2img", "/sdapi/v1/img2img"),
)


def valid(value: Any, schema: Any) -> bool:
    return jsonschema_rs.validator_for(schema).is_valid(value)


@pytest.mark.parametrize(
    ("path", "name", "body"), EXAMPLES, ids=[f"{p}:{n}" for p, n, _ in EXAMPLES]
)
def test_examples_work(server: Client, path: str, name: str, body: dict[str, Any]) -> None:
    assert valid(body, BODIES[path]["schema"])
    answer = server.post(PATH.get(path, path), body)
    assert answer.status == (202 if path == "/v1/jobs" else 200), answer.data
    if path == "/v1/jobs":
        told = server.done(answer.json["id"])
        schema = SPEC["paths"][path]["post"]["responses"]["202"]["content"]["application/json"]
        assert valid(answer.json, schema["schema"])
        assert [result["outcome"] for result in told["results"]] == ["ok"] * body.get("count", 1)


def test_every_generating_call_has_examples_and_errors() -> None:
    assert set(GENERATING) <= {path for path, _, _ in EXAMPLES}
    for path in (*GENERATING, "/v1/images/edits", "/v1/images/variations"):
        call = SPEC["paths"][path]["post"]
        assert call["summary"]
        assert call["description"]
        assert {"400", "401", "404", "413", "429", "500", "503", "504"} <= set(call["responses"])
    forms = [p for p, c in SPEC["paths"].items() if "multipart/form-data" in json.dumps(c)]
    assert {"/v1/inference/{model}", "/v1/images/edits", "/v1/images/variations"} == set(forms)
    # The server's refusals are 400s: FastAPI's own form of them is not there.
    assert all("422" not in c["responses"] for p in SPEC["paths"].values() for c in p.values())


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("body", [{}, {"prompt": 3}, [1], {"prompt": "a", "width": 33}])
def test_errors_look_as_described(server: Client, path: str, body: Any) -> None:
    answer = server.post(PATH.get(path, path), json.dumps(body).encode())
    assert 400 <= answer.status < 500, answer.data
    responses = SPEC["paths"][path]["post"]["responses"]
    shape = responses[str(answer.status)]["content"]["application/json"]["schema"]
    assert valid(answer.json, shape), answer.data


def test_the_request_is_described_from_its_record() -> None:
    fields = BODIES["/v1/jobs"]["schema"]["properties"]
    assert set(GenerateRequest.model_fields) <= set(fields)
    assert valid({"prompt": "a", "steps": 3}, BODIES["/v1/jobs"]["schema"])
    for wrong in ({"steps": 0}, {"width": 33}, {"count": "many"}, {"safety": "maybe"}):
        assert not valid({"prompt": "a", **wrong}, BODIES["/v1/jobs"]["schema"]), wrong
    assert "-1 draws one" in fields["seed"]["description"]
    table = BODIES["/v1/inference/{model}"]["schema"]
    assert not valid({"prompt": "a", "num_images": 5}, table)
    assert not valid({"prompt": "a", "steps": 3}, table)


# -- sizes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sized() -> Iterator[Client]:
    """Two models of different native sizes."""
    unet = MICRO.unet.replace(sample_size=16)
    made = {"small": micro_model(), "large": micro_model(MICRO.replace(unet=unet))}
    settings = Settings(models=tuple(made), azureml=True, without_checker=True)
    house = House(settings, loader=lambda name, **_: Generator(made[name]))
    with serving(house) as client:
        yield client


@pytest.mark.parametrize(("model", "side"), [("small", 32), ("large", 128)])
def test_the_default_size_is_the_models(sized: Client, model: str, side: int) -> None:
    body = {"prompt": "a red cube"}
    told = sized.done(sized.post("/v1/jobs", {**body, "steps": 1, "model": model}).json["id"])
    shapes = [side_of(sized.get(told["results"][0]["url"]).data)]
    for size in ({}, {"size": "auto"}):
        asked = {**body, **size, "num_inference_steps": 1, "model": model}
        made = sized.post("/v1/images/generations", asked).json
        assert made["size"] == f"{side}x{side}"
        shapes.append(side_of(made["data"][0]["b64_json"]))
    made = sized.post(f"/v1/inference/{model}", {**body, "num_inference_steps": 1}).json
    shapes.append(side_of(made["images"][0].split(",")[1]))
    settings = {"sd_model_checkpoint": model}
    made = sized.post("/sdapi/v1/txt2img", {**body, "steps": 1, "override_settings": settings}).json
    shapes.append(side_of(made["images"][0]))
    assert set(shapes) == {(side, side)}
    if model == "small":  # the server's first
        asked = {"data": ["a red cube"], "parameters": {"num_inference_steps": 1}}
        (row,) = sized.post("/score", {"input_data": asked}).json
        assert side_of(row["generated_image"]) == (side, side)
