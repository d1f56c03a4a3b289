"""The ids beside its own that a user may give away in a user namespace: /etc/subuid and /etc/subgid."""

from __future__ import annotations

import re

# dify-sandbox runs code as the users 10000 to 10999.
FEWEST = 11000
# Ids inside a namespace end at 65535.
MOST = 65535


def find(text: str, user: str, uid: int) -> tuple[int, int] | None:
    """A user's first range that is large enough, out of such a file: its first id, and how many are of use."""
    for line in text.splitlines():
        owner, _, numbers = line.partition(":")
        if owner in (user, str(uid)) and re.fullmatch(r"\d+:\d+", numbers):
            first, count = map(int, numbers.split(":"))
            if count >= FEWEST:
                return first, min(count, MOST)
    return None


def free(*texts: str) -> int:
    """The first id after everybody's ranges, for a new one."""
    ranges = [found for text in texts for found in re.findall(r":(\d+):(\d+)$", text, re.MULTILINE)]
    return max([100000, *(int(first) + int(count) for first, count in ranges)])
