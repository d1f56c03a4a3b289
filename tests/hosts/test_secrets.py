"""Secrets stay where the service user alone reads them."""

from tests.hosts.kit_host import KitHost


def test_configuration_and_data_are_private(kit: KitHost) -> None:
    readable = kit.probe("modes")
    assert not readable, f"open to others: {readable}. Run `make deploy`; it sets folders to 0700 and files to 0600."


def test_no_secret_in_logs_or_arguments(kit: KitHost) -> None:
    # Only on this machine can the probe read the controller's file beside the host's own.
    answer = kit.probe(
        "leaks", secrets_file=kit.facts["secrets_file"] if kit.local and not kit.facts["become"] else None
    )
    assert answer["known"] >= 3, f"only {answer['known']} secrets found under {kit.home}/etc/env: nothing was compared"
    assert not answer["found"], (
        f"secrets can be read: {answer['found']}. Remove the file or end the process, and change that secret."
    )
