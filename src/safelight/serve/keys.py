"""Who may ask: API keys with their names, priorities, quotas and models, from a TOML file.

    [[key]]
    name = "gallery"
    key = "a long secret"          # or key_sha256 = "…", so that the file holds no secret
    priority = 5                   # higher goes first
    seconds_per_minute = 30        # of the device; a minute's worth may be asked for at once
    queued = 20                    # jobs that may wait or run at a time
    models = ["tiny-v"]            # those that it may name; without: all

A key is hashed when it is read: it is in no record, no log and no message.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from safelight.errors import InvalidRequest, SafelightError
from safelight.serve.jobs import Busy
from safelight.spec import Record


class Rule(Record):
    """What a key may. The fields are those of the file."""

    name: str = Field(min_length=1, max_length=100)
    priority: int = Field(default=0, ge=-100, le=100)
    seconds_per_minute: float | None = Field(default=None, gt=0)
    queued: int | None = Field(default=None, ge=1)
    models: tuple[str, ...] = ()


class Quota(Busy):
    """A key has used up what it may. The same request will be taken later."""


class Forbidden(SafelightError):
    """A key may not do this."""


class Asker:
    """Whoever holds a key, and what they have used.

    Args:
        rule: what they may.
        digest: SHA-256 of the key.
        clock: seconds, never going back.
    """

    def __init__(
        self, rule: Rule, digest: bytes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rule, self.digest, self._clock = rule, digest, clock
        self._lock = threading.Lock()
        self._left, self._at = rule.seconds_per_minute or 0.0, clock()

    @property
    def name(self) -> str:
        return self.rule.name

    def may_use(self, model: str) -> None:
        """Raises:
        Forbidden: not one of this key's models.
        """
        if self.rule.models and model not in self.rule.models:
            theirs = ", ".join(self.rule.models)
            raise Forbidden(f"model: this key may not use {model}; it may use {theirs}.")

    def charge(self, seconds: float, waiting: int) -> None:
        """Take a job's seconds off what is left of the minute. A full minute takes any job.

        Args:
            waiting: this key's jobs that wait or run.

        Raises:
            Quota: it has too many jobs, or has used up its seconds.
        """
        rule = self.rule
        if rule.queued is not None and waiting >= rule.queued:
            raise Quota(1.0, f"this key has {waiting} jobs waiting, of at most {rule.queued}")
        if rule.seconds_per_minute is None:
            return
        rate = rule.seconds_per_minute / 60
        with self._lock:
            now = self._clock()
            self._left = min(rule.seconds_per_minute, self._left + rate * (now - self._at))
            self._at = now
            needed = min(seconds, rule.seconds_per_minute)
            if self._left < needed * (1 - 1e-9):
                wait = (needed - self._left) / rate
                raise Quota(wait, f"this key may use {rule.seconds_per_minute:g} s a minute")
            self._left -= seconds

    def refund(self, seconds: float) -> None:
        """Give back what was charged and not used."""
        with self._lock:
            self._left = min(self.rule.seconds_per_minute or 0.0, self._left + seconds)


class Keys:
    """All that are known."""

    def __init__(self, askers: Sequence[Asker]) -> None:
        self.askers = tuple(askers)

    @classmethod
    def of(cls, file: str | Path | None, plain: Sequence[str] = ()) -> Keys:
        """Those of a file, and keys without rules.

        Raises:
            InvalidRequest: the file cannot be read; the message names the entry, never a key.
        """
        made = [Asker(Rule(name=f"key-{k}"), digest(key)) for k, key in enumerate(plain, 1)]
        if file is not None:
            made += _read(Path(file))
        for kind, values in (
            ("name", [each.name for each in made]),
            ("key", [each.digest for each in made]),
        ):
            if len(set(values)) < len(values):
                raise InvalidRequest("keys", f"two entries have the same {kind}.")
        return cls(made)

    def find(self, authorization: str) -> Asker | None:
        """Whose key this header holds: ``Bearer KEY``, or ``Basic`` with the key as password.

        Every key is compared, in constant time.
        """
        given, found = digest(_token(authorization)), None
        for asker in self.askers:
            if hmac.compare_digest(asker.digest, given):
                found = asker
        return found


def digest(key: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _token(authorization: str) -> str:
    kind, _, rest = authorization.strip().partition(" ")
    if kind.lower() == "basic":
        try:
            decoded = base64.b64decode(rest.strip(), validate=True).decode("utf-8", "replace")
        except (binascii.Error, ValueError):
            return ""
        return decoded.partition(":")[2]
    return rest.strip() if kind.lower() == "bearer" else ""


def _read(path: Path) -> list[Asker]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest("keys", f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        # Not the parser's words: they may quote the line, and with it a key.
        raise InvalidRequest("keys", f"{path} is not TOML.") from None
    entries = document.get("key")
    if set(document) != {"key"} or not isinstance(entries, list) or not entries:
        raise InvalidRequest("keys", f"{path} must hold [[key]] entries and nothing else.")
    return [_asker(path, k, entry) for k, entry in enumerate(entries, 1)]


def _asker(path: Path, place: int, entry: dict[str, object]) -> Asker:
    where, fields = f"{path}, entry {place}", dict(entry)
    plain, hashed = fields.pop("key", None), fields.pop("key_sha256", None)
    if (plain is None) == (hashed is None):
        raise InvalidRequest("keys", f"{where}: give either key or key_sha256.")
    if plain is not None and (not isinstance(plain, str) or len(plain.strip()) < 8):
        raise InvalidRequest("keys", f"{where}: the key must have at least 8 characters.")
    try:
        rule = Rule.model_validate(fields)
        found = digest(plain.strip()) if isinstance(plain, str) else bytes.fromhex(str(hashed))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise InvalidRequest("keys", f"{where}: {name}: {first['msg']}.") from None
    except ValueError:
        found = b""
    if len(found) != 32:
        raise InvalidRequest("keys", f"{where}: key_sha256 must be 64 hexadecimal digits.")
    return Asker(rule, found)
