"""The suite's own guards hold."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An empty suite under this suite's conftest, run as in CI."""
    monkeypatch.setenv("SAFELIGHT_CI", "1")
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    return pytester


@pytest.mark.tries_network
@pytest.mark.parametrize("host", ["example.com", "192.0.2.1", "2001:db8::1"])
def test_another_machine_is_out_of_reach(host: str) -> None:
    with pytest.raises(OSError, match="no network"):
        socket.create_connection((host, 80), timeout=1)


def test_this_machine_is_within_reach() -> None:
    with socket.create_server(("localhost", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()


def test_a_swallowed_attempt_fails_and_unlisted_skips_fail(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import contextlib, socket, pytest

        def test_swallowed():
            with contextlib.suppress(OSError):
                socket.create_connection(("example.com", 80), timeout=1)

        def test_machine(): pytest.skip("no CUDA device")
        def test_whim(): pytest.skip("tired")
        @pytest.mark.skip(reason="later")
        def test_mark(): ...
        @pytest.mark.xfail
        def test_known(): assert False
        """,
        test_whole_file="import pytest; pytest.importorskip('no_such_module')",
    )
    result = suite.runpytest_subprocess("--continue-on-collection-errors")
    # Errors: the attempt (found at teardown), the marked skip and the file that skips itself.
    result.assert_outcomes(passed=1, skipped=1, failed=1, xfailed=1, errors=3)
