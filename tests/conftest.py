"""The whole suite: one thread, no network, the same examples every time, and no quiet skips."""

from __future__ import annotations

import atexit
import ipaddress
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# One thread: micro models gain nothing from more. Set before anything imports torch, and
# inherited by the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A user's own model cache must not decide a test.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="safelight-tests-")
os.environ["XDG_CACHE_HOME"] = os.path.join(os.environ["HF_HOME"], "cache")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

settings.register_profile(
    "safelight",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("safelight")

# -- no network -------------------------------------------------------------------------------


class NetworkBlocked(OSError):
    """A test tried to reach another machine."""


def _is_local(host: Any) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Blocks look-ups and connections that leave this machine, and fails the test that tried.

    A test that provokes an attempt on purpose is marked ``tries_network``; it is blocked too.
    """
    attempts: list[str] = []

    def guard(host: Any) -> None:
        if not _is_local(host):
            attempts.append(str(host))
            raise NetworkBlocked(f"tests have no network: {host}")

    def guarded(method: Any) -> Any:
        def call(self: socket.socket, *arguments: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                guard(arguments[-1][0])
            return method(self, *arguments)

        return call

    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **keywords: Any) -> Any:
        guard(host)
        return look_up(host, *arguments, **keywords)

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    if attempts and request.node.get_closest_marker("tries_network") is None:
        pytest.fail(f"the test tried to reach {', '.join(attempts)}")


# -- skips ------------------------------------------------------------------------------------

ALLOWED_SKIPS = re.compile(
    r"no (CUDA|MPS) device|no C compiler|no curl|no compel package|needs (Windows|macOS|Linux)"
    r"|the extra sign is not installed|no Chromium"
)
"""Reasons that are true of a machine. Any other skip fails where SAFELIGHT_CI is set."""


def _refuse_skip(report: Any) -> None:
    if "SAFELIGHT_CI" in os.environ and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        if not ALLOWED_SKIPS.search(reason):
            report.outcome = "failed"
            report.longrepr = f"a skip that tests/conftest.py does not allow: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[Any]:
    report = yield
    _refuse_skip(report)
    return report
