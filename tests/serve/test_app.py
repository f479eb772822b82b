"""The server by HTTP: jobs, the dialects by their own clients, refusals."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from micro_systems import system
from safelight import provenance
from serving_micro import Client, serving, toy_house

CUBE = "a red cube on top of a blue sphere"
FEW = {"prompt": CUBE, "steps": 3, "seed": 7, "sampler": "euler"}


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    with serving(toy_house()) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def picture(side: int = 32, alpha: bool = False) -> bytes:
    pixels = np.zeros((side, side, 4 if alpha else 3), np.uint8)
    pixels[: side // 2] = 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def opened(data: bytes | str) -> np.ndarray:
    data = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(data)), np.int16)


def expected(**fields: Any) -> list[np.ndarray]:
    made = system("sd-v1").generate(**{**FEW, **fields})
    return [np.asarray(result.image, np.int16) for result in made]


# -- native -------------------------------------------------------------------------------------


def test_a_job_from_beginning_to_end(server: Client, tmp_path: Any) -> None:
    answer = server.post("/v1/jobs", {**FEW, "count": 2, "preview_every": 1})
    assert answer.status == 202
    job = answer.json["id"]
    assert answer.headers["location"] == f"/v1/jobs/{job}"
    told = server.done(job)
    assert (told["status"], told["progress"], told["finished"]) == ("completed", 1.0, 2)
    assert [result["seed"] for result in told["results"]] == [7, 8]
    for result, right in zip(told["results"], expected(count=2), strict=True):
        data = server.get(result["url"]).data
        assert np.abs(opened(data) - right).max() <= 1
        (tmp_path / "made.png").write_bytes(data)
        assert provenance.read(tmp_path / "made.png").request.seed == result["seed"]
    assert opened(server.get(f"/v1/jobs/{job}/preview").data).shape[2] == 3
    events = server.get(f"/v1/jobs/{job}/events").data.decode()
    assert events.startswith("event: done\n")
    assert server.ask("DELETE", f"/v1/jobs/{job}").status == 204
    assert server.get(f"/v1/jobs/{job}").status == 404


def test_events_and_cancelling(server: Client) -> None:
    job = server.post("/v1/jobs", {**FEW, "steps": 500}).json["id"]
    assert server.post(f"/v1/jobs/{job}/cancel").status == 200
    told = server.done(job)
    assert told["status"] == "cancelled"
    assert server.get("/v1/jobs").json["jobs"][-1]["id"] == job


def test_what_there_is(server: Client) -> None:
    told = server.get("/v1/capabilities").json
    assert told["models"] == ["toy", "owner/other"]
    assert "dpm++2m" in told["samplers"]
    assert server.get("/openapi.json").json["paths"]["/v1/jobs"]
    assert server.get("/healthz").json == {"status": "ok"}


def test_readiness_and_metrics(server: Client) -> None:
    server.done(server.post("/v1/jobs", FEW).json["id"])
    assert server.get("/readyz").status == 200
    text = server.get("/metrics").data.decode()
    assert 'safelight_requests_total{route="/v1/jobs",status="202"}' in text
    assert 'safelight_running_jobs{model="toy"} 0.0' in text


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": "   "}, "prompt"),
    ({**FEW, "steps": 0}, "steps"),
    ({**FEW, "steps": 513}, "steps"),
    ({**FEW, "num_inference_steps": "many"}, "num_inference_steps"),
    ({**FEW, "count": 11}, "count"),
    ({**FEW, "width": 33}, "width"),
    ({**FEW, "width": 8192, "height": 8192}, "width"),
    ({**FEW, "sampler": "magic"}, "sampler"),
    ({**FEW, "seed": -2}, "seed"),
    ({**FEW, "guidance_scale": float("nan")}, "guidance_scale"),
    ({**FEW, "image": "/etc/passwd"}, "image"),
    ({**FEW, "image": "http://127.0.0.1/x.png"}, "image"),
    ({**FEW, "image": base64.b64encode(b"no picture").decode()}, "image"),
    ({**FEW, "images": ["AAAA"]}, "images"),
    ({**FEW, "mask": base64.b64encode(picture()).decode()}, "mask"),
    ({**FEW, "colour": "red"}, "colour"),
    ({**FEW, "timeout": "soon"}, "timeout"),
    ({**FEW, "output_format": "bmp"}, "output_format"),
    ({**FEW, "loras": [["missing", 1.0]]}, "lora"),
    ({**FEW, "prompt": "x" * 20_000}, "prompt"),
]


@pytest.mark.parametrize(("body", "field"), REFUSED, ids=[str(k) for k in range(len(REFUSED))])
def test_refusals_name_the_field(server: Client, body: dict[str, Any], field: str) -> None:
    answer = server.post("/v1/jobs", body)
    assert answer.status == 400, answer.data
    error = answer.json["error"]
    assert error["param"].startswith(field)
    assert error["message"].startswith(error["param"])
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"[" * 100_000], ids=range(5))
def test_bodies_that_are_no_object(server: Client, body: bytes) -> None:
    for path in ("/v1/jobs", "/v1/images/generations", "/v1/inference/toy", "/score"):
        answer = server.post(path, body)
        assert answer.status == 400, (path, answer.data)
        assert b"body" in answer.data
    assert server.done(server.post("/v1/jobs", FEW).json["id"])["status"] == "completed"


def test_keys_and_the_size_of_bodies() -> None:
    with serving(toy_house(api_keys=("secret", "other"), max_body=2048)) as client:
        assert client.get("/healthz").status == 200
        assert client.post("/v1/jobs", FEW).status == 401
        wrong = {"authorization": "Bearer secrets"}
        assert client.post("/v1/jobs", FEW, headers=wrong).status == 401
        right = {"authorization": "bearer other", "x-request-id": "mine"}
        taken = client.post("/v1/jobs", FEW, headers=right)
        assert (taken.status, taken.headers["x-request-id"]) == (202, "mine")
        large = client.post("/v1/jobs", {**FEW, "negative_prompt": "x" * 4000}, headers=right)
        assert large.status == 413
        with pytest.raises(openai.AuthenticationError, match="API key"):
            openai.OpenAI(base_url=f"{client.url}/v1", api_key="no", max_retries=0).models.list()


def test_a_full_queue_says_when_to_come_back() -> None:
    house = toy_house(queue_seconds=0.001)
    with serving(house) as client:
        first = client.post("/v1/jobs", {**FEW, "steps": 500})
        house.worker(None).meter.per_unit = 1.0
        answer = client.post("/v1/jobs", FEW)
        assert answer.status == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["x-should-retry"] == "true"
        client.post(f"/v1/jobs/{first.json['id']}/cancel")


# -- OpenAI, by its own client ------------------------------------------------------------------


def test_generations(client: openai.OpenAI) -> None:
    made: Any = client.images.generate(
        prompt=CUBE,
        n=2,
        response_format="b64_json",
        extra_body={"seed": 7, "num_inference_steps": 3, "sampler": "euler"},
    )
    for entry, right in zip(made.data, expected(count=2), strict=True):
        assert np.abs(opened(entry.b64_json) - right).max() <= 1
    assert [entry.seed for entry in made.data] == [7, 8]
    assert made.data[0].nsfw_content_detected is None


def test_addresses_formats_and_sizes(server: Client, client: openai.OpenAI) -> None:
    made = client.images.generate(
        prompt=CUBE,
        size="40x32",
        output_format="jpeg",
        extra_body={"steps": 2},  # type: ignore[arg-type]
    )
    assert made.data is not None
    text = made.data[0].b64_json
    assert text is not None
    assert Image.open(io.BytesIO(base64.b64decode(text))).format == "JPEG"
    made = client.images.generate(prompt=CUBE, response_format="url", extra_body={"steps": 2})
    assert made.data is not None
    address = made.data[0].url
    assert address is not None
    assert address.startswith(server.url)
    assert opened(server.get(address.removeprefix(server.url)).data).shape[2] == 3


def test_streaming(client: openai.OpenAI) -> None:
    events = list(
        client.images.generate(
            prompt=CUBE, stream=True, partial_images=2, extra_body={"seed": 7, "steps": 9}
        )
    )
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_generation.completed"
    assert set(kinds[:-1]) <= {"image_generation.partial_image"}


def test_edits_and_variations(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"seed": 3, "steps": 4, "strength": 0.5}
    made = client.images.edit(image=picture(), prompt=CUBE, extra_body=how)
    assert made.data is not None
    right = system("sd-v1").generate(CUBE, image=picture(), **how)[0]
    assert (
        np.abs(opened(made.data[0].b64_json or "") - np.asarray(right.image, np.int16)).max() <= 1
    )
    masked = client.images.edit(
        image=[picture()], mask=picture(alpha=True), prompt=CUBE, extra_body={"steps": 4}
    )
    assert masked.data
    with pytest.raises(openai.BadRequestError, match="makes no variations"):
        client.images.create_variation(image=picture())


def test_variations_by_a_model_that_looks() -> None:
    looking = system("image-variations")
    with serving(toy_house(model=looking.model)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        how: dict[str, Any] = {"seed": 3, "steps": 4}
        made = client.images.create_variation(image=picture(), n=2, extra_body=how)
    assert made.data is not None
    right = looking.generate(image=picture(), count=2, **how)
    for entry, result in zip(made.data, right, strict=True):
        pixels = opened(entry.b64_json or "")
        assert np.abs(pixels - np.asarray(result.image, np.int16)).max() <= 1


def test_errors_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.generate(prompt=CUBE, extra_body={"num_inference_steps": -1})
    assert raised.value.param == "num_inference_steps"
    assert raised.value.code == "invalid_value"
    assert raised.value.request_id
    with pytest.raises(openai.NotFoundError, match="owner/other"):
        client.images.generate(prompt=CUBE, model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="size"):
        client.images.generate(prompt=CUBE, size="huge")  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="partial_images"):
        client.images.generate(prompt=CUBE, partial_images=9)
    assert [model.id for model in client.models.list().data] == ["toy", "owner/other"]
    assert client.models.retrieve("other").id == "owner/other"


# -- DeepInfra and AzureML ----------------------------------------------------------------------


def test_deepinfra(server: Client) -> None:
    body = {"prompt": CUBE, "num_images": 2, "num_inference_steps": 3, "seed": "7", "lora": ""}
    told = server.post("/v1/inference/owner/other", {**body, "width": 128, "height": 128}).json
    assert told["seed"] == 7
    assert told["nsfw_content_detected"] == [False, False]
    assert told["inference_status"]["status"] == "succeeded"
    assert all(opened(image.split(",", 1)[1]).shape == (128, 128, 3) for image in told["images"])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_images": 5}, "num_images"),
        ({"num_inference_steps": 513}, "num_inference_steps"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"guidance_scale": 21}, "guidance_scale"),
        ({"strength": 1.5}, "strength"),
        ({"seed": -1}, "seed"),
        ({"width": 64}, "width"),
        ({"use_compel": "maybe"}, "use_compel"),
        ({"webhook": "http://x"}, "webhook"),
        ({"steps": 3}, "steps"),
        ({"prompt": ""}, "prompt"),
    ],
)
def test_deepinfra_refusals(server: Client, changes: dict[str, Any], field: str) -> None:
    answer = server.post("/v1/inference/toy", {"prompt": CUBE, **changes})
    assert answer.status == 400
    assert answer.json["detail"]["loc"] == ["body", field]


def test_deepinfra_multipart(server: Client) -> None:
    edge = b"--edge"
    parts = [
        b'\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + CUBE.encode(),
        b'\r\nContent-Disposition: form-data; name="num_inference_steps"\r\n\r\n4',
        b'\r\nContent-Disposition: form-data; name="strength"\r\n\r\n0.5',
        b'\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + picture(),
    ]
    body = b"".join(edge + part + b"\r\n" for part in parts) + edge + b"--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=edge"}
    answer = server.post("/v1/inference/toy", body, headers=headers)
    assert answer.status == 200, answer.data
    assert len(answer.json["images"]) == 1


def test_azureml(server: Client) -> None:
    sample = {
        "input_data": {
            "columns": ["prompt"],
            "data": [CUBE, ["a blue cone"]],
            "index": [0, 1],
            "parameters": {"num_inference_steps": 3, "guidance_scale": 7.5},
        }
    }
    told = server.post("/score", sample).json
    assert [set(row) for row in told] == [
        {"prompt", "generated_image", "nsfw_content_detected"}
    ] * 2
    assert [row["prompt"] for row in told] == [CUBE, "a blue cone"]
    data = base64.b64decode(told[0]["generated_image"])
    assert Image.open(io.BytesIO(data)).format == "JPEG"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input_data"),
        ({"input_data": {"data": []}}, "input_data.data"),
        ({"input_data": {"data": [3]}}, "input_data.data[0]"),
        ({"input_data": {"columns": ["text"], "data": ["a"]}}, "input_data.columns"),
        ({"input_data": {"data": ["a"], "parameters": {"seed": 3}}}, "seed"),
        ({"input_data": {"data": ["a"] * 11}}, "input_data.data"),
    ],
)
def test_azureml_refusals(server: Client, body: dict[str, Any], field: str) -> None:
    answer = server.post("/score", body)
    assert answer.status == 400
    assert answer.json["field"] == field
    assert json.loads(answer.data)["message"]
