"""AzureML's scoring: the card's request and answer, by HTTP, by the score script, in batch."""

from __future__ import annotations

import asyncio
import base64
import csv
import importlib.util
import io
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from content_safety_double import Service, content_safety
from micro_models import toy_model
from micro_systems import photo, system
from safelight.cli.main import main as door
from safelight.convert import write_model
from safelight.errors import InvalidRequest, ModelNotFound, SafelightError
from safelight.generate import Generator
from safelight.safety import Moderation
from safelight.safety.azure import AzureContentSafety
from safelight.serve import score, score_batch, scoring
from safelight.serve.app import create_app
from safelight.serve.house import House, Settings
from safety_micro import flag_half, reference, rigged, save_reference
from serving_micro import serving, toy_house

SEED = Path(__file__).parents[2] / "deploy" / "azureml"
FEW = {"num_inference_steps": 2, "guidance_scale": 7.5}
VARIABLES = ("MODEL", "DEVICE", "DTYPE", "SAFETY_CHECKER", "WITHOUT_CHECKER")


def sample(*prompts: Any, **parameters: Any) -> dict[str, Any]:
    given = prompts or ("a red cube", "a blue cone")
    return {
        "input_data": {
            "columns": ["prompt"],
            "data": list(given),
            "index": list(range(len(given))),
            "parameters": parameters or FEW,
        }
    }


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


# -- by HTTP --------------------------------------------------------------------------------------


def test_the_cards_sample_by_http() -> None:
    """The card's own request, unchanged, and every promise of its answer."""
    house = toy_house(model=toy_model(checker=rigged([0.1], [0.9])), without_checker=False)
    with serving(house) as client:
        answer = client.post("/score", scoring.SAMPLE)
    assert answer.status == 200
    assert isinstance(answer.json, list)
    first, second = answer.json
    assert list(first) == ["prompt", "generated_image", "nsfw_content_detected"]
    assert [row["prompt"] for row in answer.json] == scoring.SAMPLE["input_data"]["data"]
    assert (first["nsfw_content_detected"], second["nsfw_content_detected"]) == (False, True)
    pictures = [opened(row["generated_image"]) for row in answer.json]
    assert {picture.format for picture in pictures} == {"JPEG"}
    assert np.asarray(pictures[0]).max() > 0
    assert np.asarray(pictures[1]).max() == 0  # totally black


def test_the_sample_in_the_samples_folder_is_the_cards() -> None:
    assert json.loads((SEED / "data" / "request.json").read_text()) == scoring.SAMPLE


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"parameters": {"seed": 3}}, "seed"),
        ({"parameters": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"parameters": {"guidance_scale": "much"}}, "guidance_scale"),
        ({"parameters": [1]}, "input_data.parameters"),
        ({"index": [0]}, "input_data.index"),
        ({"data": ["a", " "]}, "prompt"),
        ({"data": [["a", "b"], "c"]}, "input_data.data[0]"),
        ({"columns": ["prompt", "seed"]}, "input_data.columns"),
        ({"orient": "split"}, "orient"),
    ],
)
def test_refusals_name_the_field(change: dict[str, Any], field: str) -> None:
    body = sample()
    body["input_data"] |= change
    with pytest.raises(InvalidRequest) as raised:
        scoring.read(body)
    assert raised.value.field == field
    with pytest.raises(InvalidRequest, match="params"):
        scoring.read({**sample(), "params": {}})


def test_older_requests_have_no_parameters() -> None:
    (request,) = scoring.read({"input_data": {"columns": ["prompt"], "data": [["a"]]}})
    assert (request.prompt, request.steps, request.guidance_scale) == ("a", None, None)


# -- no checker -----------------------------------------------------------------------------------


def test_a_server_without_a_checker_does_not_start(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        door(["serve", "-m", "tiny", "--azureml", "--port", "0"])
    assert left.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--without-checker" in said
    assert "--safety-checker PATH" in said
    with pytest.raises(SystemExit) as left:
        door(["serve", "-m", "tiny", "--without-checker", "--port", "0"])
    assert left.value.code == 2
    assert "--azureml" in capsys.readouterr().err


def test_nor_does_the_application_by_itself() -> None:
    async def start(house: House) -> None:
        app = create_app(house=house)
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(InvalidRequest, match="without-checker"):
        asyncio.run(start(toy_house(without_checker=False)))
    asyncio.run(start(toy_house(without_checker=True)))


def test_without_the_option_nothing_is_scored() -> None:
    with serving(toy_house(azureml=False)) as client:
        assert client.post("/score", sample()).status == 404
        assert "/score" not in client.get("/openapi.json").json["paths"]


# -- the score script -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registered model as AzureML mounts it: some folders down, its checker beside it."""
    root = tmp_path_factory.mktemp("azureml-models")
    folder = root / "stable-diffusion-v1-5" / "1" / "stable-diffusion-v1-5"
    generator = system("sd-v1")
    write_model(generator.model, folder)
    images = [
        result.image
        for result in generator.generate(
            ["a red cube", "a blue cone", "a cone", "a cube"], seed=[1, 2, 3, 4], steps=2
        )
    ]
    peer = reference()
    flag_half(peer, [image for image in images if image is not None])
    save_reference(peer, root / "checker")
    return root


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch, registered: Path) -> Iterator[pytest.MonkeyPatch]:
    """The environment of a deployment."""
    for name in VARIABLES:
        monkeypatch.delenv(f"SAFELIGHT_{name}", raising=False)
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(registered / "stable-diffusion-v1-5" / "1"))
    monkeypatch.setenv("SAFELIGHT_SAFETY_CHECKER", str(registered / "checker"))
    yield monkeypatch
    score._held.clear()
    score_batch._held.clear()


def script(name: str) -> Any:
    """A file of ``code_configuration``, imported as AzureML does."""
    path = SEED / "code" / name
    spec = importlib.util.spec_from_file_location(path.stem + "_sample", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_score_script_as_azureml_calls_it(azure: pytest.MonkeyPatch) -> None:
    entry = script("score.py")
    entry.init()
    answer = json.loads(json.dumps(entry.run(json.dumps(sample("a cube", "a cone", "a sphere")))))
    assert [row["prompt"] for row in answer] == ["a cube", "a cone", "a sphere"]
    for row in answer:
        black = bool(np.asarray(opened(row["generated_image"])).max() == 0)
        assert row["nsfw_content_detected"] is black


def test_wrong_requests_get_a_400_of_azuremls_own(azure: pytest.MonkeyPatch) -> None:
    entry = script("score.py")
    entry.init()
    with pytest.raises(InvalidRequest, match="seed"):  # anywhere else
        entry.run(json.dumps(sample(seed=3)))

    class AMLResponse:
        def __init__(self, body: Any, status: int, json_str: bool = False) -> None:
            self.body, self.status = json.loads(json.dumps(body)), status

    module: Any = types.ModuleType("aml_response")
    module.AMLResponse = AMLResponse
    for name in ("azureml_inference_server_http", "azureml_inference_server_http.api"):
        azure.setitem(sys.modules, name, types.ModuleType(name))
    azure.setitem(sys.modules, "azureml_inference_server_http.api.aml_response", module)
    for raw, field in (
        (json.dumps(sample(seed=3)), "seed"),
        ("{", "body"),
        (json.dumps([1]), "body"),
        (json.dumps(sample(*["a"] * 65)), "input_data.data"),
    ):
        refused = entry.run(raw)
        assert (refused.status, refused.body["field"]) == (400, field)


def test_init_finds_one_model_and_wants_a_checker(azure: pytest.MonkeyPatch) -> None:
    with pytest.raises(SafelightError, match="init"):
        score.run("{}")
    azure.delenv("SAFELIGHT_SAFETY_CHECKER")
    with pytest.raises(InvalidRequest, match="SAFELIGHT_WITHOUT_CHECKER=1"):
        score.init()
    azure.setenv("SAFELIGHT_WITHOUT_CHECKER", "1")
    score.init()
    assert score.run(sample("a cube"))[0]["nsfw_content_detected"] is False
    azure.setenv("SAFELIGHT_MODEL", "stable-diffusion-v1-5")  # a folder inside
    score.init()
    assert Path(score._held[0].model.source).name == "stable-diffusion-v1-5"


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="SAFELIGHT_MODEL"):
        scoring.find_model(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert scoring.find_model(tmp_path).name == "model.safetensors"
    (tmp_path / "other.ckpt").touch()
    with pytest.raises(ModelNotFound, match=r"model\.safetensors, other\.ckpt"):
        scoring.find_model(tmp_path)


# -- batch ----------------------------------------------------------------------------------------


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_batch_as_azureml_calls_it(azure: pytest.MonkeyPatch, tmp_path: Path) -> None:
    azure.setenv("AZUREML_BI_OUTPUT_PATH", str(tmp_path / "out"))
    entry = script("score_batch.py")
    entry.init()
    photo().save(tmp_path / "start.png")
    first = write(
        tmp_path / "a.csv",
        ",prompt,num_inference_steps,guidance_scale",
        '0,"a cube, red",2,3',
        "1,a cone,2,",
    )
    second = write(
        tmp_path / "b.csv", "index,prompt,image,num_inference_steps", "0,a sphere,start.png,2"
    )
    made = entry.run([str(first), str(second)])
    assert isinstance(made, pandas.DataFrame)
    assert list(made.columns) == list(score_batch.COLUMNS)
    assert list(made["prompt"]) == ["a cube, red", "a cone", "a sphere"]
    assert list(made["_azureml_filename"]) == ["a.csv", "a.csv", "b.csv"]
    for name, flagged in zip(made["generated_image"], made["nsfw_content_detected"], strict=True):
        assert name.startswith("image_")
        picture = Image.open(tmp_path / "out" / name)
        assert picture.format == "JPEG"
        assert (np.asarray(picture).max() == 0) == flagged
    # Tried again, as after a lost machine: the same files.
    assert list(entry.run([str(first)])["generated_image"]) == list(made["generated_image"])[:2]
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_pictures_are_mini_batches_of_a_model_that_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AZUREML_BI_OUTPUT_PATH", str(tmp_path / "out"))
    monkeypatch.setattr(score_batch, "_held", [system("image-variations")])
    photo().save(tmp_path / "start.png")
    made = score_batch.run([tmp_path / "start.png"])
    assert Image.open(tmp_path / "out" / made["generated_image"][0]).size == (32, 32)
    monkeypatch.setattr(score_batch, "_held", [system("sd-v1")])
    with pytest.raises(InvalidRequest):
        score_batch.run([tmp_path / "gone.png"])


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (["text", "a"], "has no column prompt"),
        (["prompt,seed", "a,3"], "column seed"),
        (["prompt", "a", '" "'], r"a\.csv, row 3: must hold a prompt"),
        (["prompt,num_inference_steps", "a,many"], "row 2: num_inference_steps is not a number"),
        (["prompt,num_inference_steps", "a,0"], "row 2: num_inference_steps"),
        (["prompt", "a,b"], "row 2: has more cells"),
        (["prompt,image", "a,../secret.png"], "row 2: there is no picture"),
        (["prompt,image", "a,nothing"], "row 2: image is not base64"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, rows: list[str], match: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    photo().save(tmp_path / "secret.png")
    with pytest.raises(InvalidRequest, match=match):
        score_batch.read(write(folder / "a.csv", *rows))


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"notes\.txt"):
        score_batch.read(write(tmp_path / "notes.txt", "a"))
    (tmp_path / "b.csv").write_bytes(b"prompt\n\xff\xfe\n")
    with pytest.raises(InvalidRequest, match="UTF-8"):
        score_batch.read(tmp_path / "b.csv")


def test_a_folder_here_on_one_machine(azure: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    write(folder / "a.csv", "prompt,num_inference_steps", "a cube,2")
    write(folder / "b.csv", "prompt,num_inference_steps", "a cone,2", "a sphere,2")
    azure.setenv("AZUREML_BI_OUTPUT_PATH", "")
    score_batch.main([str(folder), "-o", str(tmp_path / "out")])
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == ["a cube", "a cone", "a sphere"]
    assert all((tmp_path / "out" / row["generated_image"]).is_file() for row in rows)
    (tmp_path / "none").mkdir()
    with pytest.raises(InvalidRequest, match="nothing to score"):
        score_batch.main([str(tmp_path / "none"), "-o", str(tmp_path / "out")])


# -- content safety -------------------------------------------------------------------------------


@pytest.fixture
def safe(azure: pytest.MonkeyPatch) -> Iterator[Service]:
    with content_safety() as service:
        for name, value in service.environment.items():
            azure.setenv(name, value)
        yield service


def test_content_safety_online(safe: Service) -> None:
    score.init()
    answer = score.run(sample("a cube", "a fight"))
    assert [row["generated_image"] == "" for row in answer] == [False, True]
    assert answer[1] == {
        "prompt": "a fight",
        "generated_image": "",
        "nsfw_content_detected": True,
    }
    assert score.run(sample("a fight")) == {}  # as the published scripts have it
    safe.picture = {"Sexual": 4}
    (row,) = score.run(sample("a cube"))
    black = row["generated_image"] and np.asarray(opened(row["generated_image"])).max() == 0
    assert row["generated_image"] == "" or black  # a picture that is black already is not sent


def test_content_safety_in_batch(safe: Service, tmp_path: Path, azure: pytest.MonkeyPatch) -> None:
    azure.setenv("AZUREML_BI_OUTPUT_PATH", str(tmp_path / "out"))
    score_batch.init()
    file = write(tmp_path / "a.csv", "prompt,num_inference_steps", "a cube,2", "a scratch,2")
    made = score_batch.run([file])
    assert made["generated_image"][1] == "Blocked By Azure AI Content Safety"  # 2 is above 1
    assert made["nsfw_content_detected"][1]
    assert (tmp_path / "out" / made["generated_image"][0]).is_file()


def test_content_safety_by_http(capsys: pytest.CaptureFixture[str]) -> None:
    with content_safety() as service:
        moderation = Moderation(AzureContentSafety(service.url, "a-key"))
        made = Generator(toy_model(checker=rigged([0.1])), moderation=moderation)
        house = House(Settings(models=("toy",), azureml=True), loader=lambda *_, **__: made)
        with serving(house) as client:
            answer = client.post("/score", sample("a cube", "a fight"))
            assert [bool(row["generated_image"]) for row in answer.json] == [True, False]
            assert client.post("/score", sample("a fight")).json == {}
    with pytest.raises(SystemExit):
        door(["serve", "-m", "tiny", "--content-safety", "--port", "0"])
    assert "CONTENT_SAFETY_ENDPOINT" in capsys.readouterr().err
