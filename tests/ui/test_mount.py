"""The page on a server's port: what it may load, who may open it, and the two kinds of servers."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient

from safelight.cli import ui
from safelight.errors import InvalidRequest, ModelNotFound
from safelight.serve.app import create_app
from safelight.serve.client import Client, Full, Missing, Remote, Unreachable
from safelight.serve.local import Local
from serving_micro import serving, toy_house

BODY = {"prompt": "a red cube", "seed": 4, "steps": 3, "count": 2, "preview_every": 1}


@contextmanager
def opened(**settings: Any) -> Iterator[TestClient]:
    house = toy_house(**settings)
    house.worker(None)
    app = ui.with_page(create_app(house=house))
    with TestClient(app, follow_redirects=False) as client:
        yield client


def test_the_page_loads_nothing_from_elsewhere() -> None:
    with opened() as client:
        answer = client.get("/ui/")
        theme = client.get("/ui/theme.css").text
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert int(answer.headers["content-length"]) == len(answer.content)
    tags = re.findall(r"<(?:link|script|img|meta)\b[^>]*>", answer.text)
    assert [tag for tag in tags if re.search(r'(?:src|href|content)="https?://', tag)] == []
    assert re.findall(r"url\(['\"]?https?:", theme) == []
    assert '"analytics_enabled":false' in answer.text.replace(" ", "")


def test_the_root_leads_to_the_page_and_the_interfaces_stay() -> None:
    with opened() as client:
        assert client.get("/").headers["location"] == "/ui/"
        assert client.get("/v1/capabilities").json()["models"] == ["toy", "owner/other"]
        assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
        assert "content-security-policy" not in client.get("/healthz").headers


def test_with_keys_the_page_asks_for_one() -> None:
    with opened(api_keys=("secret",)) as client:
        assert client.get("/v1/capabilities").status_code == 401
        assert client.get("//v1/capabilities").status_code == 401
        assert client.get("/").status_code == 307
        config = client.get("/ui/config")
        assert config.status_code == 401  # gradio's own: nobody has signed in
        wrong = client.post("/ui/login", data={"username": "ada", "password": "no"})
        assert wrong.status_code == 400
        right = client.post("/ui/login", data={"username": "ada", "password": "secret"})
        assert right.status_code == 200
        assert client.get("/ui/config").status_code == 200
        assert client.get("/v1/capabilities").status_code == 401  # a cookie is no key


# -- one client, two ways --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["local", "remote"])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    house = toy_house(api_keys=("secret",), max_steps=50)
    if request.param == "local":
        yield Local(house)
        house.close()
        return
    with serving(house) as server:
        yield Remote(server.url, "secret")


def finished(client: Client, name: str) -> Any:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        told = client.job(name)
        if told["status"] in ("completed", "failed", "cancelled"):
            return told
        time.sleep(0.01)
    raise AssertionError(told)


def test_a_job_either_way(client: Client) -> None:
    from safelight import provenance
    from safelight.store.pictures import read_metadata

    told = finished(client, client.submit(BODY)["id"])
    assert [result["seed"] for result in told["results"]] == [4, 5]
    data = client.picture(told["id"], 1)
    assert '"seed":5' in (read_metadata(data).json or "")
    assert client.preview(told["id"]) is not None
    assert provenance.KIND in (read_metadata(data).json or "")


def test_capabilities_either_way(client: Client) -> None:
    found = client.capabilities()
    assert found["models"] == ["toy", "owner/other"]
    assert found["limits"]["max_steps"] == 50
    toy = client.model("toy")
    assert toy["loaded"] is True
    assert toy["modes"] == ["text", "image", "inpaint"]
    assert toy["checker"] is False
    assert client.capabilities()["details"]["toy"]["native_size"] == 32


def test_cancelling_either_way(client: Client) -> None:
    name = client.submit({**BODY, "steps": 50, "count": 4})["id"]
    client.cancel(name)
    assert finished(client, name)["status"] == "cancelled"
    assert client.job(name)["finished"] == 0 or client.job(name)["results"]


@pytest.mark.parametrize(
    ("changes", "kind", "field"),
    [
        ({"steps": 51}, InvalidRequest, "steps"),
        ({"steps": "x"}, InvalidRequest, "steps"),
        ({"mask": "?"}, InvalidRequest, "mask"),
        ({"noise_level": 5}, InvalidRequest, "noise_level"),
        ({"model": "none"}, ModelNotFound, None),
    ],
)
def test_errors_are_the_same_either_way(
    client: Client, changes: dict[str, Any], kind: type, field: str | None
) -> None:
    with pytest.raises(kind) as refused:
        client.submit({**BODY, **changes})
    if field is not None:
        assert refused.value.field == field
        assert not refused.value.problem.startswith(field)


def test_no_such_picture_either_way(client: Client) -> None:
    name = finished(client, client.submit(BODY)["id"])["id"]
    with pytest.raises(Exception, match="has no picture 7"):
        client.picture(name, 7)


def test_a_full_queue_either_way() -> None:
    house = toy_house(queue_seconds=1e-6)
    long = {**BODY, "steps": 400}
    with serving(house) as server:
        for client in (Local(house), Remote(server.url)):
            first = client.submit(long)["id"]
            with pytest.raises(Full) as refused:
                client.submit(long)
            assert refused.value.retry_after >= 1
            client.cancel(first)
            finished(client, first)


def test_nobody_there() -> None:
    with pytest.raises(Unreachable):
        Remote("http://127.0.0.1:9", timeout=2).capabilities()
    with pytest.raises(InvalidRequest):
        Remote("ftp://127.0.0.1")


def test_a_wrong_key_is_told() -> None:
    house = toy_house(api_keys=("secret",))
    with serving(house) as server, pytest.raises(Exception, match="API key"):
        Remote(server.url, "wrong").capabilities()


def test_something_else_than_safelight() -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello")

        def log_message(self, *_: Any) -> None: ...

    other = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.handle_request, daemon=True).start()
    with pytest.raises(Unreachable, match="not answer as Safelight"):
        Remote(f"http://127.0.0.1:{other.server_port}").capabilities()
    other.server_close()


def test_a_page_for_a_server_elsewhere() -> None:
    with serving(toy_house()) as server:
        app = ui.remote(server.url, None)
        with TestClient(app) as client:
            assert "Safelight" in client.get("/ui/").text
            assert client.get("/v1/capabilities").status_code == 404


def test_what_another_model_can_is_known_without_loading_it() -> None:
    from safelight.serve import describe
    from safelight.serve.house import House, Settings

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing may be loaded for this")

    house = House(Settings(models=("tiny-v", "/some/folder")), loader=never)
    found = describe.server(house)["details"]
    assert found["tiny-v"]["modes"] == ["text", "image", "inpaint"]
    assert found["tiny-v"]["native_size"] == 128
    assert "tiny-v" in found["tiny-v"]["card"]
    assert found["/some/folder"]["family"] is None


@pytest.mark.parametrize(
    ("family", "modes"),
    [
        ("sd-v1", ["text", "image", "inpaint"]),
        ("inpaint", ["inpaint"]),
        ("depth", ["image"]),
        ("unclip", ["vary"]),
        ("image-variations", ["vary"]),
        ("x4-upscaler", ["upscale"]),
    ],
)
def test_modes_are_what_the_engine_takes(family: str, modes: list[str]) -> None:
    """Each mode that is offered is accepted by the model, each that is not is refused."""
    from micro_systems import half_mask, photo, system
    from safelight.request import GenerateRequest
    from safelight.serve import describe

    generator = system(family)
    found = describe.spec(generator.model.spec)
    assert found["modes"] == modes
    words = {} if family == "image-variations" else {"prompt": "a red cube"}
    depth = {"depth": photo()} if family == "depth" else {}
    asked: dict[str, dict[str, Any]] = {
        "text": {"prompt": "a red cube"},
        "image": {**words, "image": photo(), "strength": 0.5, **depth},
        "inpaint": {**words, "image": photo(), "mask": half_mask(), "strength": 1.0},
        "vary": {**words, "images": [photo(), photo()]},
        "upscale": {**words, "image": photo(8, 8), "noise_level": 20},
    }
    if family in ("image-variations", "unclip"):
        asked.pop("upscale")
    for mode, fields in asked.items():
        try:
            request = GenerateRequest(**fields).resolved(generator.model.spec)
            generator.stream(request=[request])
            able = True
        except InvalidRequest:
            able = False
        if (family, mode) != ("inpaint", "image"):  # it would, without a mask to fill
            assert able == (mode in modes), mode


def test_missing_is_missing() -> None:
    with serving(toy_house()) as server, pytest.raises(Missing):
        Remote(server.url).job("job-0")
