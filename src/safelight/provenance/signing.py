"""C2PA: a signed manifest in the picture's file, with the user's own key (extra ``sign``).

C2PA 2.x, https://spec.c2pa.org. The manifest says ``c2pa.created`` with IPTC's digital source type
and names this program, nothing else; the signature covers every byte of the file beside itself,
settings and XMP mark included. Nothing here asks the network: no time stamps, no remote manifests,
no OCSP.
"""

# pyright: reportMissingImports=false
# (of the extra, which need not be installed where types are checked)
from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight import __version__
from safelight.errors import InvalidRequest, MissingExtra, SafelightError
from safelight.store import xmp

MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}

_SETTINGS = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},  # 30 kB of the picture inside the picture
}
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


def _library() -> Any:
    try:
        import c2pa
    except ImportError as error:
        raise MissingExtra("C2PA", "sign") from error
    return c2pa


def available() -> bool:
    """Whether the extra ``sign`` is installed."""
    try:
        _library()
    except MissingExtra:
        return False
    return True


def manifest() -> dict[str, Any]:
    """What is signed: that this program made the picture by a trained model."""
    agent = {"name": "Safelight", "version": __version__}
    created = {
        "action": "c2pa.created",
        "digitalSourceType": xmp.TRAINED,
        "softwareAgent": agent,
    }
    return {
        "claim_generator_info": [agent],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }


@dataclass(frozen=True)
class Signer:
    """A key, its certificates and their algorithm, checked. Made by :meth:`from_files`."""

    algorithm: str
    certificates: bytes
    """PEM: the signer's certificate first, then those that lead to its authority."""
    key: bytes
    """PEM, PKCS #8, not encrypted."""

    def __repr__(self) -> str:
        return f"Signer({self.algorithm})"  # never the key

    @classmethod
    def from_files(cls, key: str | Path, certificates: str | Path) -> Signer:
        """Read PEM files, and sign once for trial, so that what is wrong shows before any work.

        Args:
            key: a private key: EC on P-256, P-384 or P-521, Ed25519, or RSA of 2048 bits or more.
            certificates: its certificate, then the chain. C2PA allows no self-signed ones.

        Raises:
            MissingExtra: the extra ``sign`` is not installed.
            InvalidRequest: unreadable, of another kind, or the two do not belong together.
        """
        _library()
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization as pem

        secret = _read(key, "sign-key")
        try:
            private = pem.load_pem_private_key(secret, password=None)
        except TypeError as error:
            raise InvalidRequest(
                "sign-key",
                f"{key} is encrypted.",
                "Decrypt it first: openssl pkcs8 -topk8 -nocrypt",
            ) from error
        except ValueError as error:
            raise InvalidRequest("sign-key", f"{key} is not a private key in PEM.") from error
        chain = _read(certificates, "sign-cert")
        try:
            leaf = x509.load_pem_x509_certificates(chain)[0]
        except ValueError as error:
            raise InvalidRequest(
                "sign-cert", f"{certificates} holds no PEM certificate."
            ) from error
        shape = (pem.Encoding.DER, pem.PublicFormat.SubjectPublicKeyInfo)
        if leaf.public_key().public_bytes(*shape) != private.public_key().public_bytes(*shape):
            raise InvalidRequest(
                "sign-cert",
                f"the first certificate of {certificates} is not that of the key {key}.",
                "Put the signer's own certificate first.",
            )
        if leaf.issuer == leaf.subject:
            raise InvalidRequest(
                "sign-cert",
                f"{certificates} is self-signed, which C2PA does not allow.",
                "Have it signed by an authority, your own if need be.",
            )
        plain = private.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
        signer = cls(_algorithm(private, key), chain, plain)
        try:
            signer.sign(_blank(), "PNG")
        except SigningFailed as error:
            raise InvalidRequest(
                "sign-cert", f"cannot sign with {certificates}: {error}"
            ) from error
        return signer

    def sign(self, data: bytes, format: str) -> bytes:
        """The same file with a signed manifest in it.

        Args:
            format: ``PNG``, ``JPEG`` or ``WEBP``.

        Raises:
            SigningFailed: the C2PA library refuses the credentials (expired, self-signed …).
        """
        c2pa = _library()
        info = c2pa.C2paSignerInfo(self.algorithm, self.certificates, self.key, None)
        out = io.BytesIO()
        try:
            with (
                c2pa.Context.from_dict(_SETTINGS) as context,
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder(manifest(), context=context) as builder,
            ):
                builder.sign(signer, MIME[format], io.BytesIO(data), out)
        except c2pa.C2paError as error:
            raise SigningFailed(f"{error}.") from error
        return out.getvalue()


class SigningFailed(SafelightError):
    """The C2PA library would not sign."""


@dataclass(frozen=True)
class Signed:
    """What a file's manifest says, and what its signature is worth.

    Args:
        state: ``trusted`` (unchanged, and its certificate leads to a given authority), ``valid``
            (unchanged, by nobody that we know) or ``invalid``.
        signer: the certificate's name, which is only as good as ``state``.
        source_types: digital source types that its actions declare.
        problems: the checks that failed, by C2PA's codes.
        manifest: the active manifest.
    """

    state: str
    signer: str
    source_types: tuple[str, ...]
    problems: tuple[str, ...]
    manifest: Mapping[str, Any]


def check(data: bytes, authorities: bytes = b"") -> Signed | None:
    """Read and check a file's manifest; None where it holds none.

    Args:
        authorities: PEM certificates of those whose word counts.

    Raises:
        MissingExtra: the extra ``sign`` is not installed.
    """
    c2pa = _library()
    settings: dict[str, Any] = dict(_SETTINGS)
    if authorities:
        settings["trust"] = {"trust_anchors": authorities.decode("utf-8", "replace")}
    try:
        with (
            c2pa.Context.from_dict(settings) as context,
            c2pa.Reader(None, io.BytesIO(data), context=context) as reader,
        ):
            document = json.loads(reader.json())
    except c2pa.C2paError as error:
        if "ManifestNotFound" in str(error):
            return None
        return Signed("invalid", "", (), (str(error),), {})
    active = document.get("manifests", {}).get(document.get("active_manifest"), {})
    issued = active.get("signature_info", {})
    state = str(document.get("validation_state", "Invalid")).lower()
    codes = [str(entry.get("code")) for entry in document.get("validation_status", [])]
    return Signed(
        state=state if state in ("trusted", "valid") else "invalid",
        signer=", ".join(filter(None, [issued.get("common_name"), issued.get("issuer")])),
        source_types=tuple(_source_types(active)),
        problems=tuple(c for c in codes if c != "signingCredential.untrusted"),
        manifest=active,
    )


def _source_types(active: Mapping[str, Any]) -> list[str]:
    found = []
    for assertion in active.get("assertions", []):
        if str(assertion.get("label", "")).startswith("c2pa.actions"):
            for action in assertion.get("data", {}).get("actions", []):
                found.append(action.get("digitalSourceType"))
    return [str(kind) for kind in dict.fromkeys(found) if kind]


def _read(path: str | Path, field: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest(field, f"cannot read {path}: {error.strerror}.") from error


def _algorithm(key: Any, path: object) -> str:
    """The COSE algorithm that goes with a key."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return "ps256"
    raise InvalidRequest(
        "sign-key", f"{path} is of a kind that C2PA does not know.", "EC P-256, Ed25519 or RSA."
    )


def _blank() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()
