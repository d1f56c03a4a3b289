"""Is a site's own certificate one that browsers will take? Looked at on the controller, before any host is touched.

Needs `cryptography`, which Ansible brings along; nothing here runs on a host.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from .kit_report import Problem

#: How long before its end a certificate is spoken of.
WARN_DAYS = 30


def names(certificate: x509.Certificate) -> list[str]:
    """The host names and addresses that a certificate is for; browsers look nowhere else."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return found.get_values_for_type(x509.DNSName) + [str(a) for a in found.get_values_for_type(x509.IPAddress)]


def covers(known: Iterable[str], host: str) -> bool:
    """Whether one of a certificate's names is this host's: itself, or ``*.`` in place of its first label."""
    host = host.lower().strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        wild = "*." + host.partition(".")[2]
        return any(name.lower() in (host, wild) for name in known)
    return str(address) in known


def examine(
    certificate_pem: bytes, key_pem: bytes, host: str, now: datetime, where: tuple[str, str]
) -> tuple[list[Problem], list[str]]:
    """What is wrong with a certificate (PEM, the server's own first) and its key, and what is worth knowing.

    ``host`` as it stands in the public URL, ``now`` with a time zone, ``where``: the two files, for the messages.
    """
    try:
        chain = x509.load_pem_x509_certificates(certificate_pem)
    except ValueError:
        remedy = "it must be PEM (-----BEGIN CERTIFICATE-----): the server's certificate first, then the ones above it."
        return [Problem("gateway_tls_certificate holds no certificate.", where[0], remedy)], []
    own, problems, notices = chain[0], list[Problem](), list[str]()
    try:
        key = load_pem_private_key(key_pem, password=None)
    except TypeError:
        remedy = "take the passphrase off: openssl pkey -in KEY -out NEW; chmod 600 NEW"
        problems.append(Problem("gateway_tls_key has a passphrase, which nobody could type.", where[1], remedy))
    except ValueError:
        remedy = "it must be PEM (-----BEGIN PRIVATE KEY-----)."
        problems.append(Problem("gateway_tls_key holds no private key.", where[1], remedy))
    else:
        form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        if key.public_key().public_bytes(*form) != own.public_key().public_bytes(*form):
            remedy = (
                "name the key that this certificate was made for; its file begins with the server's own certificate."
            )
            what = "gateway_tls_key is not the key of the (first) certificate in gateway_tls_certificate."
            problems.append(Problem(what, where[1], remedy))
    ends, begins = own.not_valid_after_utc, own.not_valid_before_utc
    if now > ends:
        what = f"The certificate ended on {ends:%Y-%m-%d}; no browser takes it."
        problems.append(Problem(what, where[0], "renew it and deploy again."))
    elif now < begins:
        what = f"The certificate is not valid before {begins:%Y-%m-%d %H:%M} UTC."
        problems.append(Problem(what, where[0], "wait, or correct this machine's clock."))
    elif ends - now < timedelta(days=WARN_DAYS):
        left = (ends - now).days
        notices.append(f"The gateway's certificate ends on {ends:%Y-%m-%d}, in {left} days: renew it and deploy again.")
    known = names(own)
    if not covers(known, host):
        listed = f"it is for {', '.join(known)}" if known else "it names none (a common name does not count)"
        what = f"The certificate is not for {host}, the host of dify_public_url: {listed}."
        problems.append(Problem(what, where[0], "name the right certificate, or correct dify_public_url."))
    return problems, notices
