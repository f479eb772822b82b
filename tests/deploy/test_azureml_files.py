"""The AzureML samples: their YAML, the files that they name, and each sample run with doubles of
``az`` and of the Python SDK."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

from safelight.cli import main as door
from safelight.serve import score, scoring

HERE = Path(__file__).parents[2] / "deploy" / "azureml"
SAMPLES = ("online", "batch", "content_safety", "dreambooth")

PROBE = {"initial_delay", "period", "timeout", "success_threshold", "failure_threshold"}
CODE = {"code", "scoring_script"}
SCHEMAS: dict[str, dict[str, Any]] = {
    # Keys of the CLI's (v2) YAML schemas; a dict is an object with those keys, None anything.
    "environment": {
        **dict.fromkeys(("name", "version", "description", "tags", "image", "conda_file")),
        "build": dict.fromkeys(("path", "dockerfile_path")),
        "inference_config": {
            f"{kind}_route": dict.fromkeys(("path", "port"))
            for kind in ("liveness", "readiness", "scoring")
        },
    },
    "managedOnlineEndpoint": dict.fromkeys(
        (
            "name",
            "description",
            "tags",
            "auth_mode",
            "defaults",
            "identity",
            "traffic",
            "public_network_access",
            "mirror_traffic",
        )
    ),
    "managedOnlineDeployment": {
        **dict.fromkeys(
            ("name", "description", "tags", "endpoint_name", "model", "model_mount_path")
        ),
        **dict.fromkeys(("environment", "environment_variables", "instance_type")),
        **dict.fromkeys(("instance_count", "app_insights_enabled", "scale_settings")),
        **dict.fromkeys(("data_collector", "egress_public_network_access")),
        "code_configuration": dict.fromkeys(CODE),
        "request_settings": dict.fromkeys(
            ("request_timeout_ms", "max_concurrent_requests_per_instance", "max_queue_wait_ms")
        ),
        "liveness_probe": dict.fromkeys(PROBE),
        "readiness_probe": dict.fromkeys(PROBE),
    },
    "batchEndpoint": dict.fromkeys(
        ("name", "description", "tags", "auth_mode", "defaults", "properties")
    ),
    "batchDeployment": {
        **dict.fromkeys(("name", "description", "tags", "endpoint_name", "type", "model")),
        **dict.fromkeys(("environment", "compute")),
        "code_configuration": dict.fromkeys(CODE),
        "resources": dict.fromkeys(("instance_count", "instance_type", "shm_size", "properties")),
        "settings": {
            **dict.fromkeys(("max_concurrency_per_instance", "mini_batch_size", "error_threshold")),
            **dict.fromkeys(("output_action", "output_file_name", "logging_level")),
            "environment_variables": None,
            "retry_settings": dict.fromkeys(("max_retries", "timeout")),
        },
    },
    "amlCompute": dict.fromkeys(
        (
            "name",
            "type",
            "description",
            "tags",
            "location",
            "size",
            "tier",
            "min_instances",
            "max_instances",
            "idle_time_before_scale_down",
            "ssh_settings",
            "identity",
        )
    ),
    "model": dict.fromkeys(("name", "version", "description", "tags", "type", "path", "flavors")),
    "commandJob": {
        **dict.fromkeys(("type", "name", "display_name", "experiment_name", "description", "tags")),
        **dict.fromkeys(("command", "code", "environment", "environment_variables", "compute")),
        **dict.fromkeys(("distribution", "limits", "identity", "services", "inputs", "outputs")),
        "resources": dict.fromkeys(("instance_count", "instance_type", "shm_size", "docker_args")),
    },
}
REQUIRED = {
    "environment": {"name"},
    "managedOnlineEndpoint": {"name", "auth_mode"},
    "managedOnlineDeployment": {"name", "endpoint_name", "model", "instance_type"},
    "batchEndpoint": {"name"},
    "batchDeployment": {"name", "endpoint_name", "type", "model", "compute", "code_configuration"},
    "amlCompute": {"name", "type", "size"},
    "model": {"name", "type", "path"},
    "commandJob": {"type", "command", "environment", "compute"},
}
BUILT = {"model/stable-diffusion-v1-5"}
"""Paths that whoever runs a sample provides."""


def unknown(value: Any, schema: dict[str, Any] | None, at: str = "") -> list[str]:
    if schema is None:
        return []
    found = []
    for name, inner in value.items():
        where = f"{at}{name}"
        if name not in schema:
            found.append(where)
        else:
            found += unknown(inner, schema[name], f"{where}.")
    return found


def kind_of(document: dict[str, Any]) -> str:
    address, _, name = document.pop("$schema").rpartition("/")
    assert address == "https://azuremlschemas.azureedge.net/latest"
    return name.removesuffix(".schema.json")


def documents() -> dict[str, tuple[str, dict[str, Any]]]:
    found = {}
    for path in sorted(HERE.glob("*.yml")):
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        found[path.name] = (kind_of(document), document)
    return found


FILES = documents()


@pytest.mark.parametrize("name", FILES)
def test_keys_are_those_of_the_schema(name: str) -> None:
    kind, document = FILES[name]
    assert unknown(document, SCHEMAS[kind]) == []
    assert REQUIRED[kind] <= set(document)


def test_a_wrong_key_is_found() -> None:
    kind, document = FILES["batch-deployment-fp32.yml"]
    wrong = {**document, "settings": {**document["settings"], "minibatch": 1}, "instances": 1}
    assert unknown(wrong, SCHEMAS[kind]) == ["settings.minibatch", "instances"]


@pytest.mark.parametrize("name", FILES)
def test_files_and_assets_that_it_names_exist(name: str) -> None:
    _, document = FILES[name]
    code, build = document.get("code_configuration"), document.get("build")
    paths = [document["conda_file"]] if "conda_file" in document else []
    if code:
        paths.append(f"{code['code']}/{code['scoring_script']}")
    if build:
        paths.append(f"{build['path']}/{build['dockerfile_path']}")
    inputs = [v for v in document.get("inputs", {}).values() if isinstance(v, dict)]
    named = [v["path"] for v in (*inputs, document) if "path" in v]
    paths += [path for path in named if not path.startswith("azureml:")]
    for path in paths:
        assert path in BUILT or (HERE / path).exists(), path
    names = {(kind, each["name"]) for kind, each in FILES.values() if "name" in each}
    for field, kind in (
        ("environment", "environment"),
        ("model", "model"),
        ("compute", "amlCompute"),
    ):
        if field in document:
            wanted = document[field].removeprefix("azureml:").removesuffix("@latest")
            assert (kind, wanted) in names
    if "endpoint_name" in document:
        kind = "batchEndpoint" if FILES[name][0] == "batchDeployment" else "managedOnlineEndpoint"
        assert (kind, document["endpoint_name"]) in names


def test_settings_are_ones_that_the_scripts_read() -> None:
    """Variables that mean nothing would be dropped in silence."""
    sources = [Path(module.__file__ or "").read_text() for module in (score, scoring)]
    sources.append((HERE / "server" / "Dockerfile").read_text())
    known = {"CONTENT_SAFETY_ENDPOINT", "CONTENT_SAFETY_KEY", "CONTENT_SAFETY_THRESHOLD"}
    known |= {f"SAFELIGHT_{n}" for n in ("MODEL", "DEVICE", "DTYPE", "SAFETY_CHECKER")}
    known |= {"WORKER_COUNT", "SAFELIGHT_WITHOUT_CHECKER"}
    assert "SAFELIGHT_" in "".join(sources)
    for kind, document in FILES.values():
        given = document.get("environment_variables") or {}
        if kind == "batchDeployment":
            given = document["settings"].get("environment_variables", {})
        assert set(given) <= known
        assert all(isinstance(value, str) for value in given.values())  # YAML 1 is no text


def test_profiles_and_thresholds_are_the_cards() -> None:
    machines = runpy.run_path(str(HERE / "machines.py"))["read"]()
    for name, profile in machines["profiles"].items():
        online = FILES[profile["online"]][1]
        batch = FILES[profile["batch"]][1]
        assert online["name"] == batch["name"] == name
        assert online["environment_variables"]["SAFELIGHT_DTYPE"] == profile["dtype"]
        assert batch["settings"]["environment_variables"]["SAFELIGHT_DTYPE"] == profile["dtype"]
        most = online["request_settings"]["max_concurrent_requests_per_instance"]
        assert most == profile["concurrency"]
    online = FILES["online-deployment-safe.yml"][1]["environment_variables"]
    batch = FILES["batch-deployment-safe.yml"][1]["settings"]["environment_variables"]
    thresholds = (online["CONTENT_SAFETY_THRESHOLD"], batch["CONTENT_SAFETY_THRESHOLD"])
    assert thresholds == ("2", "1")
    for _, document in FILES.values():
        settings = document.get("settings", {})
        if settings:
            assert (settings["output_action"], settings["output_file_name"]) == (
                "append_row",
                "predictions.csv",
            )
            assert settings["error_threshold"] == 0


def test_machines_are_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(HERE / "machines.py"))
    data = module["read"]()
    card = ["NC6s_v3", "NC12s_v3", "NC24s_v3", "ND40rs_v2", "ND96amsr_A100_v4", "ND96asr_v4"]
    listed = [f"Standard_{name}" for name in card]
    assert data["lists"] == {"inference": listed, "finetune": listed}
    assert list(data["machines"]) == listed
    assert tuple(data["smallest"].values()) == (6, 1, 112, 336)
    for each in data["machines"].values():
        assert all(each[name] >= data["smallest"][name] for name in ("vcpus", "gpus", "memory_gib"))
    assert module["table"]().count("inference, finetune") == 6
    with pytest.raises(SystemExit, match="not on the card's list"):
        module["check"]("Standard_DS2_v2", "inference")
    used = {d.get("instance_type") or d.get("size") for _, d in FILES.values()} - {None}
    assert used <= set(listed)


def test_the_servers_command_starts_with_options_that_exist() -> None:
    """Of the fast profile's container, which cannot be built here."""
    lines = (HERE / "server" / "Dockerfile").read_text().splitlines()
    shell = json.loads(next(line for line in lines if line.startswith("CMD")).removeprefix("CMD "))
    assert shell[:2] == ["sh", "-c"]
    given = {"AZUREML_MODEL_DIR": "/m", "SAFELIGHT_MODEL": "sd", "SAFELIGHT_OPTIONS": "--live 4"}
    echo = shell[2].replace("exec safelight", "printf '%s\\n'")
    said = subprocess.run(
        ["sh", "-c", echo], env=given, capture_output=True, text=True, check=True
    ).stdout.split("\n")[:-1]
    command = door._load(said[0])
    with command.make_context("serve", said[1:]) as context:
        assert context.params["models"] == ["/m/sd"]
        assert (context.params["dtype"], context.params["live"]) == ("float16", 4)
        assert context.params["azureml"]
        assert not context.params["without_checker"]


def test_the_dreambooth_job_gives_options_that_exist() -> None:
    job = FILES["dreambooth-job.yml"][1]
    text = job["command"].replace("${{outputs.trained_model}}", "/out")
    for name, value in job["inputs"].items():
        given = value if isinstance(value, str | int) else f"/{name}"
        assert f"${{{{inputs.{name}}}}}" in text
        text = text.replace(f"${{{{inputs.{name}}}}}", str(given))
    assert "${{" not in text
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True, check=True
    ).stdout.split("\n")[:-1]
    assert words[0] == "safelight"
    with door._load(words[1]).make_context(words[1], words[2:]) as context:
        assert context.params["instance_prompt"] == "a photo of sks dog"
        assert context.params["steps"] == 800


# -- the samples, run -----------------------------------------------------------------------------

AZ = """#!/bin/sh
for word in "$@"; do printf '%s\\037' "$word"; done >>"$AZ_LOG"
printf '\\n' >>"$AZ_LOG"
case "$*" in
*"online-endpoint invoke"*) cat "$AZ_ANSWER" ;;
*"--query name"*) echo job-7 ;;
esac
"""


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The samples, with what their reader provides, and an answer of the endpoint."""
    folder = tmp_path / "azureml"
    ignored = shutil.ignore_patterns("dist", "generated", "__pycache__", "*.jpg", "answer.json")
    shutil.copytree(HERE, folder, ignore=ignored)
    (folder / "environment" / "dist").mkdir()
    row = {"prompt": "a", "generated_image": "/9j/", "nsfw_content_detected": False}
    removed = {**row, "generated_image": "", "nsfw_content_detected": True}
    (tmp_path / "answer").write_text(json.dumps(json.dumps([row, removed])))
    for name in ("SUBSCRIPTION", "RESOURCE_GROUP", "WORKSPACE", "CONTENT_SAFETY_KEY"):
        monkeypatch.setenv(name, f"my-{name.lower()}")
    monkeypatch.setenv("CONTENT_SAFETY_ENDPOINT", "https://name.example")
    return folder


def shell(copy: Path, sample: str, **environment: str) -> tuple[Any, list[list[str]]]:
    tools, log = copy.parent / "bin", copy.parent / "az.log"
    tools.mkdir()
    (tools / "az").write_text(AZ)
    (tools / "az").chmod(0o755)
    given = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "AZ_LOG": str(log),
        "AZ_ANSWER": str(copy.parent / "answer"),
        **environment,
    }
    run = subprocess.run(
        [copy / f"{sample}.sh"], env=given, capture_output=True, text=True, timeout=60, check=False
    )
    calls = log.read_text().splitlines() if log.exists() else []
    return run, [call.rstrip("\037").split("\037") for call in calls]


@pytest.mark.parametrize("profile", ["fp32", "fast"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_shell_samples_run(copy: Path, sample: str, profile: str) -> None:
    run, calls = shell(copy, sample, PROFILE=profile)
    assert run.returncode == 0, run.stderr
    files = []
    for call in calls:
        assert call[0] == "ml"
        assert "my-workspace" in call
        for option in ("--file", "--request-file", "--input"):
            if option in call:
                files.append(call[call.index(option) + 1])
                assert (copy / files[-1]).exists(), call
    made = [" ".join(call[1:3]) for call in calls]
    if sample == "dreambooth":
        assert made[-3:] == ["job create", "job stream", "model create"]
        assert "azureml://jobs/job-7/outputs/trained_model" in calls[-1]
    if sample == "online":
        assert f"online-deployment-{profile}.yml" in files
        assert (copy / "picture-0.jpg").read_bytes() == b"\xff\xd8\xff"
        assert "1: removed by content safety" in run.stdout
    if sample == "batch":
        assert f"batch-deployment-{profile}.yml" in files
    if sample == "content_safety":
        keys = [word for call in calls for word in call if word.endswith("=my-content_safety_key")]
        assert len(keys) == 2


def test_a_machine_that_is_not_on_the_list_stops_the_sample(copy: Path) -> None:
    run, calls = shell(copy, "online", MACHINE="Standard_DS2_v2")
    assert run.returncode != 0
    assert "not on the card's list" in run.stderr
    assert calls == []


@pytest.mark.parametrize("sample", SAMPLES)
def test_python_samples_run(copy: Path, sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the SDK's double: every file that a sample loads exists, and is of the kind it says."""
    client = MagicMock(name="MLClient")
    client.return_value.online_endpoints.invoke.return_value = (copy.parent / "answer").read_text()
    loaded: list[tuple[str, str]] = []

    def load(kind: str) -> Any:
        def read(path: Path) -> Any:
            document = yaml.safe_load(Path(path).read_text())
            loaded.append((kind, kind_of(document)))
            return MagicMock(**{"name": document.get("name")})

        return read

    kinds = {
        "environment": "environment",
        "model": "model",
        "compute": "amlCompute",
        "job": "commandJob",
        "online_endpoint": "managedOnlineEndpoint",
        "online_deployment": "managedOnlineDeployment",
        "batch_endpoint": "batchEndpoint",
        "batch_deployment": "batchDeployment",
    }
    fakes: dict[str, dict[str, Any]] = {
        "azure": {},
        "azure.ai": {},
        "azure.ai.ml": {
            "MLClient": client,
            "Input": MagicMock(),
            **{f"load_{kind}": load(kind) for kind in kinds},
        },
        "azure.ai.ml.entities": {"Model": MagicMock()},
        "azure.core": {},
        "azure.core.exceptions": {"ResourceNotFoundError": LookupError},
        "azure.identity": {"DefaultAzureCredential": MagicMock()},
    }
    for name, contents in fakes.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("workspace", "machines", "pictures"):  # beside the sample, as when it is run
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(copy))
    runpy.run_path(str(copy / f"{sample}.py"), run_name="__main__")
    for name in ("workspace", "machines", "pictures"):
        sys.modules.pop(name, None)
    assert loaded
    assert all(kinds[kind] == schema for kind, schema in loaded)
    assert client.call_args.args[1:] == ("my-subscription", "my-resource_group", "my-workspace")
