"""AUTOMATIC1111's interface, by the unmodified ``webuiapi`` package."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import webuiapi
from PIL import Image

from micro_systems import half_mask, photo, system
from serving_micro import Client, serving, toy_house

CUBE = "a red cube on top of a blue sphere"


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    with serving(toy_house()) as client:
        yield client


@pytest.fixture(scope="module")
def api(server: Client) -> Any:
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", sampler="Euler", steps=4)


def same(image: Image.Image, result: Any) -> bool:
    ours, theirs = (np.asarray(each, np.int16) for each in (image, result.image))
    return bool(np.abs(ours - theirs).max() <= 1)


def test_text_to_image(api: Any) -> None:
    found = api.txt2img(
        prompt="a (red:1.2) cube", negative_prompt="fog", seed=7, n_iter=2, width=32, height=32
    )
    right = system("sd-v1").generate(
        "a (red:1.2) cube",
        negative_prompt="fog",
        seed=7,
        count=2,
        steps=4,
        sampler="euler",
        guidance_scale=7.0,
        width=32,
        height=32,
        weighting="a1111",
    )
    assert len(found.images) == 2
    assert all(map(same, found.images, right))
    assert found.info["all_seeds"] == [7, 8]
    assert found.info["sampler_name"] == "Euler"
    assert "Negative prompt: fog" in found.info["infotexts"][0]
    assert found.parameters["prompt"] == "a (red:1.2) cube"
    read = api.png_info(found.images[0])
    assert read.info == "" or "Steps: 4" in read.info  # the client encodes it again


def test_image_to_image_and_inpainting(api: Any) -> None:
    image = photo(48, 32)
    how = {"seed": 3, "steps": 6, "width": 32, "height": 32, "denoising_strength": 0.5}
    found = api.img2img(images=[image], prompt=CUBE, **how)
    assert found.image.size == (32, 32)
    assert found.info["denoising_strength"] == 0.5
    found = api.img2img(
        images=[photo()], mask_image=half_mask(), prompt=CUBE, inpaint_full_res=False, **how
    )
    assert found.image.size == (32, 32)


def test_what_clients_ask_first(api: Any) -> None:
    assert {"Euler a", "DPM++ 2M"} <= {each["name"] for each in api.get_samplers()}
    assert "automatic" in {each["name"] for each in api.get_schedulers()}
    assert api.get_sd_models()[0]["title"] == "toy"
    assert api.get_options()["sd_model_checkpoint"] == "toy"
    api.util_set_model("owner/other")
    assert api.util_get_current_model() == "owner/other"
    api.set_options(api.get_options())
    api.util_set_model("toy")
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_loras() == []
    for ask in (api.get_face_restorers, api.get_hypernetworks, api.get_realesrgan_models):
        assert ask() == []
    assert api.get_memory()["ram"]["used"] > 0
    assert api.get_embeddings()["loaded"] == {}
    assert {each["name"] for each in api.get_upscalers()} >= {"Lanczos"}
    api.refresh_checkpoints()
    api.util_wait_for_ready(check_interval=0.01)


def test_progress_and_interrupt(api: Any) -> None:
    made: list[Any] = []
    run = lambda: made.append(api.txt2img(prompt=CUBE, steps=150, n_iter=8))  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    end = time.monotonic() + 30
    while not (told := api.get_progress())["state"]["job_count"]:
        assert time.monotonic() < end
        time.sleep(0.005)
    assert 0 < told["progress"] < 1
    api.interrupt()
    thread.join(30)
    assert len(made[0].images) < 8
    assert api.get_progress()["progress"] == 0


def test_open_webui_sequence(server: Client) -> None:
    """Options read, posted back whole with a model, then a bare request."""
    options = server.get("/sdapi/v1/options").json
    options["sd_model_checkpoint"] = "toy"
    assert server.post("/sdapi/v1/options", options).status == 200
    body = {"prompt": CUBE, "batch_size": 1, "width": 32, "height": 32, "steps": 3}
    answer = server.post("/sdapi/v1/txt2img", body)
    assert Image.open(io.BytesIO(base64.b64decode(answer.json["images"][0]))).size == (32, 32)


def test_enlarging(api: Any) -> None:
    found = api.extra_single_image(photo(16, 16), upscaler_1="Lanczos", upscaling_resize=2)
    assert found.image.size == (32, 32)


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"enable_hr": True}, 400, "enable_hr"),
        ({"styles": ["noir"]}, 400, "styles"),
        ({"subseed_strength": 0.5}, 400, "subseed_strength"),
        ({"tiling": True}, 400, "tiling"),
        ({"alwayson_scripts": {"ControlNet": {"args": []}}}, 400, "alwayson_scripts"),
        ({"sampler_name": "Restart the world"}, 404, "Sampler not found"),
        ({"scheduler": "sideways"}, 400, "scheduler"),
        ({"steps": 0}, 400, "steps"),
        ({"cfg_scale": -1}, 400, "cfg_scale"),
        ({"width": 33}, 400, "width"),
        ({"batch_size": 50}, 400, "count"),
        ({"override_settings": []}, 200, ""),
        ({"override_settings": [1]}, 400, "override_settings"),
        ({"unheard_of": 3}, 200, ""),
    ],
)
def test_refusals(server: Client, changes: dict[str, Any], status: int, said: str) -> None:
    body = {"prompt": CUBE, "steps": 2, "width": 32, "height": 32, **changes}
    answer = server.post("/sdapi/v1/txt2img", body)
    assert answer.status == status, answer.data
    assert said in answer.data.decode()


def test_a_missing_start_is_not_found(server: Client) -> None:
    answer = server.post("/sdapi/v1/img2img", {"prompt": CUBE})
    assert answer.status == 404
    assert "Init image not found" in answer.json["detail"]
