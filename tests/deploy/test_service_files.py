"""The container's and systemd's files: what they name exists, and the commands parse."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from safelight.cli import main as door
from safelight.serve.house import Settings

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "safelight.service"


# -- containers -----------------------------------------------------------------------------------

CONTAINERS = {
    "deploy/Dockerfile": "",
    "deploy/azureml/environment/Dockerfile": "deploy/azureml/environment",
    "deploy/azureml/server/Dockerfile": "deploy/azureml/server",
}
"""Dockerfile -> its build context."""
BUILT = {"dist"}
"""What deploy/azureml/package.sh puts there."""
INSTRUCTIONS = {
    "FROM",
    "ARG",
    "RUN",
    "ENV",
    "WORKDIR",
    "COPY",
    "USER",
    "VOLUME",
    "EXPOSE",
    "STOPSIGNAL",
    "HEALTHCHECK",
    "ENTRYPOINT",
    "CMD",
}


def instructions(path: str) -> list[tuple[str, str]]:
    """(name, rest) of a Dockerfile, continued lines joined."""
    text = (ROOT / path).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(*line.split(maxsplit=1), "")[:2] for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


@pytest.mark.parametrize("path", CONTAINERS)
def test_containers(path: str) -> None:
    found = instructions(path)
    names = [name for name, _ in found]
    assert set(names) <= INSTRUCTIONS
    assert names[0] == "FROM"
    for name, rest in found:
        if name == "COPY" and "--from=" not in rest:
            *sources, _ = shlex.split(rest)
            for source in sources:
                assert source in BUILT or (ROOT / CONTAINERS[path] / source).exists(), source
        if name in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(word, str) for word in json.loads(rest))
        if name == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest], check=False).returncode == 0, rest


def test_the_servers_container() -> None:
    found = instructions("deploy/Dockerfile")
    last = dict(found)  # of each instruction the last one
    assert last["USER"] == "safelight"
    assert found.index(("USER", "safelight")) > max(
        place for place, (name, _) in enumerate(found) if name == "RUN"
    )
    assert set(json.loads(last["VOLUME"])) == {"/data", "/models"}
    program, command, *rest = json.loads(last["ENTRYPOINT"])
    assert program == "safelight"
    with door._load(command).make_context(command, rest) as context:
        assert context.params["host"] == "0.0.0.0"
        assert str(context.params["port"]) == last["EXPOSE"]
        assert context.params["data"].startswith("/data")
    interval, command = last["HEALTHCHECK"].split("CMD ", 1)
    assert "--start-period" in interval
    code = json.loads(command)
    assert code[:2] == ["python", "-c"]
    compile(code[2], "healthcheck", "exec")
    assert f":{last['EXPOSE']}/readyz" in code[2]
    assert "download.pytorch.org/whl/cpu" in last["ARG"]
    # What is built needs nothing that is not copied.
    copied = [r for n, r in found if n == "COPY" and "--from" not in r]
    for name in ("pyproject.toml", "hatch_build.py", "constraints.txt", "README.md", "src"):
        assert any(name in shlex.split(each) for each in copied), name


def test_a_planted_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY no-such-file /\n")
    monkeypatch.setitem(CONTAINERS, str(tmp_path / "Dockerfile"), str(tmp_path))
    with pytest.raises(AssertionError, match="no-such-file"):
        test_containers(str(tmp_path / "Dockerfile"))


# -- systemd --------------------------------------------------------------------------------------


def settings() -> dict[str, dict[str, list[str]]]:
    """A unit's sections."""
    found: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            section.setdefault(name, []).append(value)
    return found


def test_the_unit_stops_after_the_drain() -> None:
    service = settings()["Service"]
    (start,) = service["ExecStart"]
    words = shlex.split(start.replace(" $SAFELIGHT_OPTIONS", ""))
    assert words[0].endswith("/safelight")
    with door._load(words[1]).make_context(words[1], words[2:]) as context:
        drain = context.params["drain_seconds"]
        assert context.params["host"] == "127.0.0.1"
        assert context.params["data"].startswith("/var/lib/safelight/")
    # A worker that does not stop is given 30 seconds more.
    assert int(service["TimeoutStopSec"][0]) >= drain + 30
    assert drain == Settings().drain_seconds
    assert service["KillSignal"] == ["SIGTERM"]
    assert service["Restart"] == ["on-failure"]


def test_the_unit_gives_up_its_rights() -> None:
    service = settings()["Service"]
    for name in (
        *("DynamicUser", "NoNewPrivileges", "ProtectHome", "PrivateTmp", "RestrictNamespaces"),
        *("ProtectKernelModules", "ProtectKernelTunables", "ProtectControlGroups"),
    ):
        assert service[name] == ["yes"], name
    assert service["ProtectSystem"] == ["strict"]
    assert service["CapabilityBoundingSet"] == [""]
    assert service["StateDirectory"] == ["safelight"]
    assert service["EnvironmentFile"] == ["/etc/safelight/safelight.env"]
    example = (UNIT.with_name("safelight.env")).read_text()
    assert "SAFELIGHT_API_KEY=" in example


def test_systemd_itself_agrees(tmp_path: Path) -> None:
    """Where it is installed; the files that the unit names are put in the place of its own."""
    verify = shutil.which("systemd-analyze")
    text = UNIT.read_text(encoding="utf-8")
    assert "/opt/safelight/bin/safelight" in text
    if verify is None:
        return  # the tests above are what there is then
    unit = tmp_path / "safelight.service"
    unit.write_text(text.replace("/opt/safelight/bin/safelight", "/bin/true"))
    said = subprocess.run(
        [verify, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (said.returncode, said.stderr) == (0, "")
