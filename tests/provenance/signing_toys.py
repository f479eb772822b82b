"""An authority and a signer of our own, for tests of C2PA."""

# pyright: reportMissingImports=false
from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, NamedTuple

DAY = datetime.timedelta(days=1)


class Credentials(NamedTuple):
    """PEM files."""

    key: Path
    certificates: Path
    authority: Path


def make(folder: Path, kind: str = "p256", *, days: int = 3650, alone: bool = False) -> Credentials:
    """A key of ``kind``, its certificate, and the authority that vouches for it.

    Args:
        days: how long the certificate is good for; below zero it has run out.
        alone: the certificate vouches for itself.
    """
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    keys: dict[str, Any] = {
        "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
    }
    root, leaf = ec.generate_private_key(ec.SECP256R1()), keys[kind]()
    authority = _certificate("authority", root, "authority", root, ca=True, days=7300)
    by, by_key = ("A. Signer", leaf) if alone else ("authority", root)
    signer = _certificate("A. Signer", leaf, by, by_key, ca=False, days=days)
    folder.mkdir(parents=True, exist_ok=True)
    made = Credentials(folder / "key.pem", folder / "chain.pem", folder / "authority.pem")
    made.key.write_bytes(
        leaf.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    )
    made.certificates.write_bytes(signer if alone else signer + authority)
    made.authority.write_bytes(authority)
    return made


def _certificate(name: str, key: Any, by: str, by_key: Any, *, ca: bool, days: int) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(who: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Toy"),
                x509.NameAttribute(NameOID.COMMON_NAME, who),
            ]
        )

    flags = dict.fromkeys(
        (
            "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
            "encipher_only", "decipher_only",
        ),
        False,
    )  # fmt: skip
    usage = x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **flags)
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(by))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 100 * DAY)
        .not_valid_after(now + days * DAY)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), True)
        .add_extension(usage, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(by_key.public_key()), False
        )
    )
    if not ca:
        mail = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        made = made.add_extension(mail, True)
    return made.sign(by_key, hashes.SHA256()).public_bytes(Encoding.PEM)
