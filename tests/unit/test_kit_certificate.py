"""A site's own certificate: what browsers would refuse is refused before anything is touched."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from ansible.module_utils import kit_certificate
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NOW = datetime(2026, 11, 25, tzinfo=UTC)
WHERE = ("/c.pem", "/k.pem")


def pair(*names: str, days: int = 90, passphrase: bytes = b"") -> tuple[bytes, bytes]:
    """A self-signed certificate for these names and addresses, and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "d.example")])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(NOW - timedelta(days=100)).not_valid_after(NOW + timedelta(days=days))
    if names:
        known: list[Any] = [
            x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name) for name in names
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(known), critical=False)
    how = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return builder.sign(key, hashes.SHA256()).public_bytes(form[0]), key.private_bytes(*form, how)


@pytest.mark.parametrize(
    ("names", "host"),
    [
        (("d.example",), "d.example"),
        (("other.example", "D.example"), "d.example"),
        (("*.example",), "d.example"),
        (("10.1.2.3",), "10.1.2.3"),
    ],
)
def test_a_sound_pair(names: tuple[str, ...], host: str) -> None:
    assert kit_certificate.examine(*pair(*names), host, NOW, WHERE) == ([], [])


@pytest.mark.parametrize(
    ("names", "host", "listed"),
    [
        (("d.example",), "e.example", "it is for d.example"),
        (("*.example",), "a.d.example", "it is for *.example"),
        (("10.1.2.3",), "10.1.2.4", "10.1.2.3"),
        ((), "d.example", "a common name does not count"),
    ],
)
def test_another_name(names: tuple[str, ...], host: str, listed: str) -> None:
    ((problem,), _) = kit_certificate.examine(*pair(*names), host, NOW, WHERE)
    assert f"not for {host}" in problem.what
    assert listed in problem.what


def test_dates() -> None:
    ((problem,), _) = kit_certificate.examine(*pair("d.example", days=-1), "d.example", NOW, WHERE)
    assert "ended on 2026-11-24" in problem.what
    ((problem,), _) = kit_certificate.examine(*pair("d.example"), "d.example", NOW - timedelta(days=200), WHERE)
    assert "not valid before" in problem.what
    (problems, (notice,)) = kit_certificate.examine(*pair("d.example", days=9), "d.example", NOW, WHERE)
    assert problems == []
    assert "ends on 2026-12-04, in 9 days" in notice


def test_all_that_is_wrong_at_once() -> None:
    certificate, _ = pair("e.example", days=-1)
    _, key = pair("d.example")
    problems, _ = kit_certificate.examine(certificate, key, "d.example", NOW, WHERE)
    assert [problem.where for problem in problems] == ["/k.pem", "/c.pem", "/c.pem"]
    assert "not the key of the (first) certificate" in problems[0].what


def test_files_that_are_something_else() -> None:
    certificate, key = pair("d.example")
    ((problem,), _) = kit_certificate.examine(key, key, "d.example", NOW, WHERE)
    assert "holds no certificate" in problem.what
    ((problem,), _) = kit_certificate.examine(certificate, certificate, "d.example", NOW, WHERE)
    assert "holds no private key" in problem.what
    certificate, key = pair("d.example", passphrase=b"word")
    ((problem,), _) = kit_certificate.examine(certificate, key, "d.example", NOW, WHERE)
    assert "has a passphrase" in problem.what
