"""Requests that are wrong: refused in the form of the interface that was spoken, by the field's
name, and the server goes on."""

from __future__ import annotations

import base64
import http.client
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from micro_systems import system
from safelight.request import ALIASES, GenerateRequest
from serving_micro import Answer, Client, serving, toy_house

CUBE = "a red cube"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    house = toy_house(model=system("sd-v1").model, max_body=8 * 2**20, max_pixels=256 * 256)
    with serving(house) as client:
        yield client
        assert client.get("/healthz").status == 200


# -- pictures -------------------------------------------------------------------------------------


def png(mode: str = "RGB", size: tuple[int, int] = (32, 32), **how: Any) -> bytes:
    return filed(Image.new(mode, size), "PNG", **how)


def filed(image: Image.Image, format: str, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **how)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A few bytes that say they are very many pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    whole = png()
    packed = b"x\0\0" + zlib.compress(bytes(2 * 10**8))
    return whole[:33] + chunk(b"zTXt", packed) + whole[33:]


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def broken() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    data = bytearray(filed(Image.fromarray(noise), "PNG"))
    data[200:400] = bytes(200)
    return bytes(data)


BROKEN: dict[str, Any] = {
    "no base64": "not base64!",
    "no picture": text(b"no picture at all"),
    "nothing": "",
    "an address": "http://127.0.0.1/x.png",
    "an address abroad": "https://example.invalid/x.png",
    "a path": "/etc/passwd",
    "a file url": "file:///etc/passwd",
    "a digest": "sha256:" + "0" * 64,
    "a number": 7,
    "an object": {"data": text(png())},
    "a bomb": text(bomb(60_000, 60_000)),
    "a large bomb": text(bomb(2**31 - 1, 2**31 - 1)),
    "no pixels": text(bomb(0, 0)),
    "half of it": text(png(size=(64, 64))[:60]),
    "a broken one": text(broken()),
    "an svg": text(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "texts that swell": text(text_bomb()),
}


# -- generated: every field, every wrong kind of value --------------------------------------------

WHOLE: list[Any] = ["many", 1.5, NAN, INF, True, [], {}, [1], -(2**70), 2**70, -3]
NUMBER: list[Any] = ["much", NAN, INF, -INF, True, [], {}, -5, 1e300]
WORDS: list[Any] = [3, [], {}, True, "x" * 20_001, "a\0b"]
NAMES: list[Any] = [3, [], {}, True, "no such thing", "x" * 5000]

Case = tuple[str, Any, str]


def each(field: str, values: list[Any]) -> list[tuple[str, Any]]:
    return [(field, value) for value in values]


NATIVE = [
    *each("prompt", [*WORDS, "", "  "]),
    *each("negative_prompt", WORDS),
    *each("steps", [*WHOLE, 0, 513]),
    *each("num_inference_steps", ["many", 0]),
    *each("guidance_scale", NUMBER),
    *each("guidance_rescale", [2, NAN, "x"]),
    *each("guidance_interval", [3, [1], [3, 1], ["a", "b"], [NAN, 1]]),
    *each("sampler", NAMES),
    *each("schedule", NAMES),
    *each("eta", [2, -1, NAN]),
    *each("width", [*WHOLE, 0, 7, 33, 8200]),
    *each("height", [0, 12, "tall"]),
    *each("seed", ["x", 1.5, NAN, True, [], -2, 2**63]),
    *each("count", [*WHOLE, 0, 11]),
    *each("clip_skip", [12, 99, -1, "x"]),
    *each("weighting", ["markdown", 3]),
    *each("loras", [3, [["x"]], [["a", "b"]], [["a", 1000]], [["none", 1.0]], ["../../etc/x"]]),
    *each("embeddings", [3, [["none", "x"]]]),
    *each("deterministic", ["yes", 3]),
    *each("preview_every", [-1, "x", 5000]),
    *each("safety", ["maybe", "reject"]),
    *each("strength", [0.5]),
    *each("mask", [text(png())]),
    *each("noise_level", ["x", 5000]),
    *each("image_embedding", [[], "x", [NAN], [1.0] * 9000]),
    *each("timeout", ["soon", -1, NAN, True]),
    *each("priority", ["high", -1, NAN, INF, 1e300]),
    *each("output_format", ["bmp", 3, []]),
    *each("model", [3, [], True]),
    *each("colour", ["red"]),
    *each("__proto__", [{}]),
]
OPENAI = [
    *each("prompt", ["", 3, [], "x" * 20_001]),
    *each("n", [0, 11, -1, "two", 1.5, True, NAN]),
    *each("size", ["huge", "1x", "x", "33x33", "0x0", "99999x99999", 3, [], "８x８"]),
    *each("response_format", ["bytes", 3, []]),
    *each("output_format", ["gif", 3]),
    *each("output_compression", [-1, 101, "x", 1.5]),
    *each("partial_images", [-1, 4, "x"]),
    *each("seed", [-2, "x"]),
    *each("stream", ["yes", 3]),
    *each("model", [3, []]),
    *each("webhook", ["http://127.0.0.1"]),
]
DEEPINFRA = [
    *each("prompt", ["", 3, [], "x" * 20_001]),
    *each("negative_prompt", [3]),
    *each("num_images", [0, 5, "x", 1.5, True, NAN, INF, [], 10**400]),
    *each("num_inference_steps", [0, 513, "1e9", NAN]),
    *each("guidance_scale", [0, 21, "x", NAN, "inf", True, []]),
    *each("strength", [-0.1, 1.1, "nan"]),
    *each("width", [0, 127, 1025, 130, "wide"]),
    *each("height", [0, 1032]),
    *each("seed", [-1, 2**63, "x", 0.5]),
    *each("use_compel", ["maybe", 3, []]),
    *each("lora_scale", [-11, 11, "x"]),
    *each("lora", [3, "none", []]),
    *each("webhook", ["http://127.0.0.1"]),
    *each("steps", [3]),
]
AZURE: list[tuple[Any, str]] = [
    ({}, "input_data"),
    ({"input_data": []}, "input_data"),
    ({"input_data": {"data": [CUBE]}, "extra": 1}, "extra"),
    ({"input_data": {"data": [CUBE], "rows": 1}}, "rows"),
    ({"input_data": {"data": CUBE}}, "input_data.data"),
    ({"input_data": {"data": {}}}, "input_data.data"),
    ({"input_data": {"data": [[CUBE, CUBE]]}}, "input_data.data[0]"),
    ({"input_data": {"data": [CUBE, None]}}, "input_data.data[1]"),
    ({"input_data": {"data": [""]}}, "prompt"),
    ({"input_data": {"data": ["x" * 20_001]}}, "prompt"),
    ({"input_data": {"data": [CUBE], "columns": "prompt"}}, "input_data.columns"),
    ({"input_data": {"data": [CUBE], "parameters": [1]}}, "input_data.parameters"),
    *[
        ({"input_data": {"data": [CUBE], "parameters": {name: value}}}, name)
        for name, value in [
            *each("num_inference_steps", [0, "x", NAN, True, 513]),
            *each("guidance_scale", [-1, "x", NAN, INF, True]),
            *each("width", [64]),
        ]
    ],
]
A1111 = [
    *each("prompt", [3, {}, "x" * 20_001]),
    *each("negative_prompt", [3]),
    *each("steps", [0, "x", NAN, True, 513, [], -1]),
    *each("cfg_scale", [-1, "x", NAN, True, 1e300]),
    *each("width", [33, "x", 8200, -8, [], True]),
    *each("height", [33, "x"]),
    *each("seed", ["x", -2, 2**63, 1.5]),
    *each("batch_size", ["x", -1, 11, NAN]),
    *each("n_iter", ["x", -1, 11]),
    *each("scheduler", ["sideways", 3]),
    *each("override_settings", [3, [1], "x", {"CLIP_stop_at_last_layers": "x"}]),
    *each("alwayson_scripts", [{"x": 1}, [1], "x", 3]),
    *each("enable_hr", [True, "yes"]),
    *each("restore_faces", [True]),
    *each("tiling", [True]),
]


def shown(value: Any) -> str:
    said = repr(value)
    return said if len(said) < 25 else said[:22] + "..."


def cases() -> Iterator[Any]:
    plain = {"prompt": CUBE, "steps": 1}
    for field, value in NATIVE:
        body = {**plain, field: value}
        yield pytest.param("/v1/jobs", body, field, id=f"native {field}={shown(value)}")
    for field, value in OPENAI:
        body = {**plain, field: value}
        yield pytest.param(
            "/v1/images/generations", body, field, id=f"openai {field}={shown(value)}"
        )
    for field, value in DEEPINFRA:
        body = {"prompt": CUBE, "num_inference_steps": 1, field: value}
        yield pytest.param("/v1/inference/toy", body, field, id=f"deepinfra {field}={shown(value)}")
    for body, field in AZURE:
        yield pytest.param("/score", body, field, id=f"azureml {shown(body)} {field}")
    for field, value in A1111:
        body = {**plain, "width": 32, "height": 32, field: value}
        yield pytest.param("/sdapi/v1/txt2img", body, field, id=f"a1111 {field}={shown(value)}")
    for name, value in BROKEN.items():
        yield pytest.param("/v1/jobs", {**plain, "image": value}, "image", id=f"native {name}")
        if value:  # no picture is no mistake there
            body = {"prompt": CUBE, "image": value}
            yield pytest.param("/v1/inference/toy", body, "image", id=f"deepinfra {name}")
            body = {"prompt": CUBE, "init_images": [value]}
            yield pytest.param("/sdapi/v1/img2img", body, "init_images", id=f"a1111 {name}")
        body = {"image": value, "upscaler_1": "Lanczos"}
        yield pytest.param("/sdapi/v1/extra-single-image", body, "image", id=f"a1111 extra {name}")
        yield pytest.param("/sdapi/v1/png-info", {"image": value}, "image", id=f"a1111 info {name}")
    for path, body, field in OTHERS:
        yield pytest.param(path, body, field, id=f"{path} {shown(body)}")


OTHERS: list[Case] = [
    ("/sdapi/v1/img2img", {"prompt": CUBE, "init_images": text(png())}, "init_images"),
    ("/sdapi/v1/img2img", {"prompt": CUBE, "init_images": [text(png())] * 2}, "init_images"),
    ("/sdapi/v1/img2img", {"prompt": CUBE, "init_images": [text(png())], "mask": "x"}, "mask"),
    (
        "/sdapi/v1/img2img",
        {"prompt": CUBE, "init_images": [text(png())], "denoising_strength": 2},
        "denoising_strength",
    ),
    (
        "/sdapi/v1/img2img",
        {"prompt": CUBE, "init_images": [text(png())], "resize_mode": 9},
        "resize_mode",
    ),
    ("/sdapi/v1/txt2img", {"prompt": CUBE, "sampler_name": "DDIM", "eta": 7}, "eta"),
    ("/sdapi/v1/extra-batch-images", {"imageList": []}, "imageList"),
    ("/sdapi/v1/extra-batch-images", {"imageList": [3]}, "imageList"),
    (
        "/sdapi/v1/extra-single-image",
        {"image": text(png()), "upscaler_1": "Magic"},
        "upscaler_1",
    ),
    (
        "/sdapi/v1/extra-single-image",
        {"image": text(png()), "upscaling_resize": 9},
        "upscaling_resize",
    ),
    (
        "/sdapi/v1/extra-single-image",
        {"image": text(png()), "upscaler_1": []},
        "upscaler_1",
    ),
    ("/sdapi/v1/options", {"sd_model_checkpoint": "none"}, "model"),
    ("/sdapi/v1/png-info", {}, "image"),
    ("/v1/images/generations", {"prompt": CUBE, "model": "dall-e-3"}, "model"),
    ("/v1/jobs", {"prompt": CUBE, "model": "none"}, "model"),
    ("/v1/inference/none", {"prompt": CUBE}, "model"),
]


def refused(answer: Answer, path: str, field: str) -> None:
    """A 4xx in the dialect's own form that names the field."""
    assert 400 <= answer.status < 500, (answer.status, answer.data[:500])
    told = answer.json
    if path.startswith("/v1/inference"):
        assert told["detail"]["error"]
        named = told["detail"]["loc"][-1]
    elif path == "/score":
        assert told["message"]
        named = told["field"]
    elif path.startswith("/sdapi"):
        assert {"error", "detail", "body", "errors"} <= set(told)
        named = told["body"]
    else:
        assert {"message", "type", "param", "code"} == set(told["error"])
        named = told["error"]["param"]
    allowed = {field, f"{field}s", "width"} if field in ("size", "height", "lora") else {field}
    if field in ("n", "batch_size", "n_iter"):
        allowed |= {"count"}
    if field == "override_settings":
        allowed |= {"CLIP_stop_at_last_layers", "sd_model_checkpoint"}
    if field == "num_inference_steps":
        allowed |= {"steps"}
    assert str(named).split("[")[0] in {name.split("[")[0] for name in allowed}, told
    assert len(answer.data) < 2000, "a short message, whatever was sent"


@pytest.mark.parametrize(("path", "body", "field"), cases())
def test_wrong_fields(server: Client, path: str, body: Any, field: str) -> None:
    refused(server.post(path, body), path, field)
    good = {"prompt": CUBE, "steps": 1, "width": 32, "height": 32}
    assert server.post("/v1/images/generations", good).status == 200


def test_there_are_many() -> None:
    assert len(list(cases())) >= 150


# -- bodies ---------------------------------------------------------------------------------------

PATHS = (
    "/v1/jobs",
    "/v1/images/generations",
    "/v1/inference/toy",
    "/score",
    "/sdapi/v1/txt2img",
)
BODIES: dict[str, bytes] = {
    "empty": b"",
    "half": b"{",
    "a list": b"[]",
    "a string": b'"x"',
    "a number": b"3",
    "null": b"null",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "a long number": b'{"prompt": "x", "steps": ' + b"9" * 100_000 + b"}",
    "half a character": b'{"prompt": "\\ud800", "input_data": {"data": ["\\ud800"]}}',
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_wrong_bodies(server: Client, path: str, body: bytes) -> None:
    answer = server.post(path, body)
    assert 400 <= answer.status < 500, (answer.status, answer.data[:300])
    assert answer.json
    assert server.get("/healthz").status == 200


@pytest.mark.parametrize("path", [*PATHS, "/v1/images/edits", "/v1/images/variations"])
@pytest.mark.parametrize(
    "kind",
    ["text/plain", "multipart/form-data", "multipart/form-data; boundary=x", "image/png", "x"],
)
def test_wrong_kinds_of_content(server: Client, path: str, kind: str) -> None:
    answer = server.post(path, b"--y\r\nnothing", headers={"content-type": kind})
    assert 400 <= answer.status < 500, (answer.status, answer.data[:300])
    assert answer.json
    assert server.get("/healthz").status == 200


@pytest.mark.parametrize("path", PATHS)
def test_too_much(server: Client, path: str) -> None:
    answer = server.post(path, b" " * (8 * 2**20 + 1))
    assert answer.status == 413
    assert "8,388,608" in answer.data.decode()


def chunked(server: Client, parts: list[bytes]) -> tuple[int, bytes]:
    """A body whose length is not told beforehand."""
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    head = {"content-type": "application/json"}
    connection.request("POST", "/v1/jobs", iter(parts), head, encode_chunked=True)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_bodies_of_unknown_length_are_bounded_too(server: Client) -> None:
    assert chunked(server, [b'{"prompt": "a cube",', b' "steps": 1}'])[0] == 202
    status, told = chunked(server, [b" " * 2**20] * 9)
    assert (status, b"8,388,608" in told) == (413, True)


def form(fields: dict[str, str | bytes]) -> tuple[bytes, dict[str, str]]:
    edge, parts = b"--edge", []
    for name, value in fields.items():
        file = b'; filename="a.png"' if isinstance(value, bytes) else b""
        data = value if isinstance(value, bytes) else value.encode()
        head = b'\r\nContent-Disposition: form-data; name="' + name.encode() + b'"' + file
        parts.append(edge + head + b"\r\n\r\n" + data + b"\r\n")
    return b"".join(parts) + edge + b"--\r\n", {
        "content-type": "multipart/form-data; boundary=edge"
    }


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        ("/v1/images/edits", {"prompt": CUBE}, "image"),
        ("/v1/images/edits", {"prompt": CUBE, "image": b"no picture"}, "image"),
        ("/v1/images/edits", {"prompt": CUBE, "image": "/etc/passwd"}, "image"),
        ("/v1/images/edits", {"prompt": CUBE, "image": bomb(60_000, 60_000)}, "image"),
        ("/v1/images/edits", {"prompt": CUBE, "image": png(), "n": "x"}, "n"),
        ("/v1/images/edits", {"prompt": CUBE, "image": png(), "n": "nan"}, "n"),
        ("/v1/images/edits", {"prompt": CUBE, "image": png(), "mask": b"x"}, "mask"),
        ("/v1/images/edits", {"prompt": CUBE, "image": png(), "strength": "2"}, "strength"),
        ("/v1/images/edits", {"prompt": CUBE, "image": png(), "size": "9"}, "size"),
        ("/v1/images/edits", {"prompt": CUBE, "image": png(), "colour": "red"}, "colour"),
        ("/v1/images/edits", {"prompt": b"a file", "image": png()}, "prompt"),
        ("/v1/images/variations", {"prompt": CUBE}, "image"),
        ("/v1/images/variations", {"image": png()}, "model"),
        ("/v1/inference/toy", {"image": png()}, "prompt"),
        ("/v1/inference/toy", {"prompt": CUBE, "image": b"no picture"}, "image"),
        ("/v1/inference/toy", {"prompt": CUBE, "num_images": "nan"}, "num_images"),
        ("/v1/inference/toy", {"prompt": b"a file"}, "prompt"),
        ("/v1/inference/toy", {"prompt": CUBE, "seed": b"1"}, "seed"),
    ],
)
def test_wrong_forms(server: Client, path: str, fields: dict[str, str | bytes], field: str) -> None:
    body, headers = form(fields)
    refused(server.post(path, body, headers=headers), path, field)
    assert server.get("/healthz").status == 200


# -- pictures that are odd and good ---------------------------------------------------------------


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return filed(Image.new("RGB", (48, 24), "red"), "JPEG", exif=exif)


ODD: dict[str, bytes] = {
    "one pixel": png(size=(1, 1)),
    "a line": png(size=(500, 1)),
    "transparent": png("RGBA"),
    "grey and transparent": png("LA"),
    "palette": png("P", transparency=0),
    "one bit": png("1"),
    "sixteen bits": png("I;16"),
    "cmyk": filed(Image.new("CMYK", (32, 32)), "JPEG"),
    "moving": filed(
        Image.new("RGB", (32, 32)),
        "GIF",
        save_all=True,
        append_images=[Image.new("RGB", (32, 32), "red")],
    ),
    "webp": filed(Image.new("RGB", (32, 32)), "WEBP"),
    "large": png(size=(4000, 3000)),
    "rotated": rotated(),
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_odd_pictures_are_taken(server: Client, data: bytes) -> None:
    body = {"prompt": CUBE, "image": text(data), "steps": 2, "strength": 0.5, "width": 32}
    answer = server.post("/v1/jobs", {**body, "height": 32})
    assert answer.status == 202, answer.data
    assert server.done(answer.json["id"])["status"] == "completed"


def test_a_rotated_picture_is_seen_the_right_way_up(server: Client) -> None:
    body = {"prompt": CUBE, "image": text(rotated()), "steps": 2, "strength": 0.5}
    told = server.done(server.post("/v1/jobs", body).json["id"])
    data = server.get(told["results"][0]["url"]).data
    made = np.asarray(Image.open(io.BytesIO(data)))
    assert made.shape[0] > made.shape[1], "stored lying, shown standing"


# -- generated ------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
KNOWN = sorted(
    {*GenerateRequest.model_fields, *ALIASES, *(name for name, _ in NATIVE + OPENAI + A1111)}
    | {"input_data", "init_images", "num_images", "override_settings", "parameters"}
)


@pytest.mark.parametrize("path", PATHS)
def test_any_json_is_an_answer(server: Client, path: str) -> None:
    small = {"prompt": CUBE, "steps": 1, "width": 32, "height": 32}

    @settings(max_examples=40)
    @given(st.dictionaries(st.sampled_from(KNOWN), JSON, min_size=1, max_size=3), st.booleans())
    def probe(fields: dict[str, Any], whole: bool) -> None:
        answer = server.post(path, {**small, **fields} if whole else fields)
        assert answer.status < 500, (fields, answer.data[:300])
        if answer.status == 202:
            server.ask("DELETE", answer.json["url"])

    probe()
    assert server.post("/v1/images/generations", small).status == 200


# -- generated from the server's own description --------------------------------------------------


def test_nothing_generated_from_the_description_is_an_error_of_the_server(server: Client) -> None:
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: list[int] = []
    for found in schema.get_all_operations():
        operation = found.ok()  # type: ignore[union-attr]

        @settings(
            max_examples=5,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        @given(case=operation.as_strategy())
        def probe(case: Any) -> None:
            answer = case.call(timeout=30)
            seen.append(answer.status_code)
            assert answer.status_code < 500, (case.path, case.body, answer.text[:300])

        probe()
    assert len(seen) > 50
    good = {"prompt": CUBE, "steps": 1, "width": 32, "height": 32}
    assert server.post("/v1/images/generations", good).status == 200
