"""Ranges of /etc/subuid and /etc/subgid."""

from __future__ import annotations

import pytest
from ansible.module_utils import kit_subids

TABLE = "other:100000:65536\nme:165536:65536\nme:300000:999999\n# a remark\n"


def test_a_users_range_is_found_by_name_or_number() -> None:
    assert kit_subids.find(TABLE, "me", 1000) == (165536, 65535)
    assert kit_subids.find("1000:200000:20000\n", "me", 1000) == (200000, 20000)


@pytest.mark.parametrize("text", ["", "other:100000:65536", "me:100000:1000", "me:100000", "me:x:65536"])
def test_what_is_no_range_or_too_short_is_none(text: str) -> None:
    assert kit_subids.find(text, "me", 1000) is None


def test_a_new_range_begins_after_everybodys() -> None:
    assert kit_subids.free(TABLE, "x:200000:5") == 300000 + 999999
    assert kit_subids.free("", "") == 100000
