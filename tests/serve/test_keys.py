"""Who may ask, for how much, and what is written down of it."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import logging.config
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from micro_models import toy_model
from safelight.errors import InvalidRequest
from safelight.serve import logs
from safelight.serve.keys import Asker, Forbidden, Keys, Quota, Rule, digest
from serving_micro import Client, serving, toy_house

FEW = {"prompt": "a very private cube", "steps": 3, "sampler": "euler"}
SECRET, OTHER = "secret-of-the-gallery", "secret-of-the-shop"
FILE = f"""
[[key]]
name = "gallery"
key = "{SECRET}"
priority = 5
models = ["toy"]

[[key]]
name = "shop"
key_sha256 = "{hashlib.sha256(OTHER.encode()).hexdigest()}"
seconds_per_minute = 30
queued = 2
"""


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "keys.toml"
    path.write_text(FILE)
    return str(path)


# -- the file -------------------------------------------------------------------------------------


def test_keys_are_found_by_header_and_never_held(file: str) -> None:
    keys = Keys.of(file, ["plain-one"])
    assert [each.name for each in keys.askers] == ["key-1", "gallery", "shop"]
    for key, name in ((SECRET, "gallery"), (OTHER, "shop"), ("plain-one", "key-1")):
        found = keys.find(f"Bearer {key}")
        assert found is not None
        assert found.name == name
        basic = base64.b64encode(f"anybody:{key}".encode()).decode()
        assert keys.find(f"basic {basic}") is found
        assert keys.find(f"  bearer   {key}  ") is found
    for wrong in ("", "Bearer", f"Bearer {SECRET}x", SECRET, "Basic !!", f"Digest {SECRET}"):
        assert keys.find(wrong) is None, wrong
    assert SECRET not in repr([vars(each) for each in keys.askers])


WRONG = {
    "nothing": "",
    "no toml": f'[[key]]\nname = "a"\nkey = "{SECRET}',
    "no key": '[[key]]\nname = "a"',
    "both": f'[[key]]\nname = "a"\nkey = "{SECRET}"\nkey_sha256 = "00"',
    "short": '[[key]]\nname = "a"\nkey = "short"',
    "no digest": '[[key]]\nname = "a"\nkey_sha256 = "xyz"',
    "no name": f'[[key]]\nkey = "{SECRET}"',
    "unknown": f'[[key]]\nname = "a"\nkey = "{SECRET}"\ncolour = "red"',
    "no number": f'[[key]]\nname = "a"\nkey = "{SECRET}"\npriority = "high"',
    "negative": f'[[key]]\nname = "a"\nkey = "{SECRET}"\nseconds_per_minute = -1',
    "another table": f'[keys]\nname = "a"\nkey = "{SECRET}"',
    "twice": f'[[key]]\nname = "a"\nkey = "{SECRET}"\n[[key]]\nname = "b"\nkey = "{SECRET}"',
    "one name": f'[[key]]\nname = "a"\nkey = "{SECRET}"\n[[key]]\nname = "a"\nkey = "{OTHER}"',
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_wrong_files_are_told_without_their_keys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as raised:
        Keys.of(path)
    assert raised.value.field == "keys"
    assert SECRET not in str(raised.value)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        Keys.of(tmp_path / "none.toml")


# -- quotas ---------------------------------------------------------------------------------------


def test_seconds_come_back_with_the_minute() -> None:
    now = [0.0]
    asker = Asker(Rule(name="a", seconds_per_minute=30), digest("k"), clock=lambda: now[0])
    asker.charge(20, 0)
    with pytest.raises(Quota) as raised:
        asker.charge(20, 0)
    assert raised.value.retry_after == 20  # 10 s short, at half a second a second
    now[0] = 19.9
    with pytest.raises(Quota):
        asker.charge(20, 0)
    now[0] = 20
    asker.charge(20, 0)
    asker.refund(15)
    asker.charge(15, 0)
    now[0] = 1000  # never more than a minute's worth
    asker.charge(30, 0)
    with pytest.raises(Quota):
        asker.charge(1, 0)


def test_a_full_minute_takes_any_job_and_owes_the_rest() -> None:
    now = [0.0]
    asker = Asker(Rule(name="a", seconds_per_minute=30), digest("k"), clock=lambda: now[0])
    asker.charge(90, 0)
    with pytest.raises(Quota) as raised:
        asker.charge(30, 0)
    assert raised.value.retry_after == 180


def test_models_and_jobs() -> None:
    asker = Asker(Rule(name="a", queued=2, models=("toy",)), digest("k"))
    asker.may_use("toy")
    with pytest.raises(Forbidden, match="toy"):
        asker.may_use("other")
    asker.charge(1e9, 1)
    with pytest.raises(Quota, match="2 jobs"):
        asker.charge(1, 2)


# -- the server -----------------------------------------------------------------------------------


def held(client: Client) -> Any:
    """Nothing ends until this is called."""
    go = threading.Event()
    worker = client.house.worker(None)
    call = worker.generator.engine._call
    worker.generator.engine._call = lambda rows: (go.wait(30), call(rows))[1]  # type: ignore
    return go.set


def test_keys_by_http(file: str) -> None:
    with serving(toy_house(model=toy_model(), keys=file)) as client:
        assert client.post("/v1/jobs", FEW).status == 401
        assert client.get("/metrics").status == 401
        assert client.get("/readyz").status in (200, 503)
        wrong = client.post("/v1/jobs", {**FEW, "model": "other"}, headers=bearer(SECRET))
        assert (wrong.status, wrong.json["error"]["param"]) == (403, "model")
        assert wrong.json["error"]["code"] == "model_not_allowed"
        go = held(client)
        ask = lambda key, **more: client.post("/v1/jobs", {**FEW, **more}, headers=bearer(key))  # noqa: E731
        first = [ask(OTHER) for _ in range(2)]
        assert [each.status for each in first] == [202, 202]
        third = ask(OTHER)
        assert third.status == 429
        assert third.json["error"]["code"] == "quota_exceeded"
        assert int(third.headers["retry-after"]) >= 1
        assert third.headers["x-should-retry"] == "true"
        preferred = ask(SECRET)
        assert preferred.status == 202, "another's quota is not this one's"
        jobs = client.house.jobs()
        assert {job.asker: job.standing for job in jobs} == {"shop": 0, "gallery": 5}
        listed = client.get("/v1/jobs", headers=bearer(SECRET)).json["jobs"]
        assert [job["id"] for job in listed] == [preferred.json["id"]], "others' are not listed"
        go()


def test_device_seconds_by_http(file: str) -> None:
    house = toy_house(model=toy_model(), keys=file)
    with serving(house) as client:
        house.worker(None).meter.per_unit = 1.0
        headers = bearer(OTHER)
        first = client.post("/v1/jobs", FEW, headers=headers)
        assert first.status == 202
        refused = client.post("/v1/images/generations", FEW, headers=headers)
        assert refused.status == 429
        assert refused.json["error"]["type"] == "rate_limit_error"
        text = client.get("/metrics", headers=headers).data.decode()
        assert 'safelight_refused_total{reason="quota_exceeded"} 1.0' in text
        assert client.post("/v1/images/generations", FEW, headers=bearer(SECRET)).status == 200


def test_what_was_cancelled_is_not_charged(file: str) -> None:
    house = toy_house(model=toy_model(), keys=file)
    with serving(house) as client:
        house.worker(None).meter.per_unit = 1.0
        go = held(client)
        job = client.post("/v1/jobs", {**FEW, "steps": 500}, headers=bearer(OTHER)).json["id"]
        assert client.post("/v1/jobs", FEW, headers=bearer(OTHER)).status == 429
        client.post(f"/v1/jobs/{job}/cancel", headers=bearer(OTHER))
        go()
        house.worker(None).meter.per_unit = 1e-9
        kept = house.job(job)
        assert kept is not None
        end = time.monotonic() + 10
        while house.keys.askers[1]._left < -5:  # a step's worth at most was used
            assert time.monotonic() < end
            time.sleep(0.01)


# -- the log --------------------------------------------------------------------------------------


def test_the_log_says_who_and_what_but_no_key_and_no_prompt(
    file: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "safelight")
    with serving(toy_house(model=toy_model(), keys=file)) as client:
        headers = {**bearer(SECRET), "x-request-id": "mine-7"}
        made = client.post("/v1/images/generations", FEW, headers=headers)
        assert made.headers["x-request-id"] == "mine-7"
        client.post("/v1/images/generations", {**FEW, "steps": 0}, headers=bearer(SECRET))
        client.post("/v1/images/generations", FEW, headers=bearer("a wrong secret"))
        odd = client.post("/score", {}, headers={**bearer(OTHER), "x-request-id": "x" * 101})
        assert len(odd.headers["x-request-id"]) == 16, "an id of our own"
    told = [getattr(record, "fields", {}) for record in caplog.records]
    requests = [fields for fields in told if "route" in fields]
    assert [(f["key"], f["dialect"], f["status"], f["outcome"]) for f in requests] == [
        ("gallery", "openai", 200, "ok"),
        ("gallery", "openai", 400, "invalid_value"),
        (None, "openai", 401, "invalid_api_key"),
        ("shop", "azureml", 400, "invalid_value"),
    ]
    assert requests[0]["request_id"] == "mine-7"
    (job,) = [fields for fields in told if "queue_seconds" in fields]
    assert (job["request_id"], job["key"], job["outcome"]) == ("mine-7", "gallery", "completed")
    for formatter in (logs.JsonLines(), logs.Plain()):
        text = "\n".join(formatter.format(record) for record in caplog.records)
        for hidden in (SECRET, OTHER, "a wrong secret", "private"):
            assert hidden not in text


def test_lines_are_json_with_their_traceback() -> None:
    try:
        raise ValueError("planted")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed %d", (3,), sys.exc_info())
    record.fields = {"job": "j", "path": Path("a")}
    told = json.loads(logs.JsonLines().format(record))
    assert (told["level"], told["message"], told["job"], told["path"]) == (
        *("error", "failed 3", "j"),
        "a",
    )
    assert "ValueError: planted" in told["error"]
    assert told["time"].endswith("Z")
    logging.config.dictConfig({**logs.config(as_json=True), "loggers": {}})
