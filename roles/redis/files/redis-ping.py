"""Exit 0 when Redis answers to its password: `redis-ping PORT`, the password in REDIS_PASSWORD.

By hand and not with the client library, which takes ten times as long to load as the answer takes.
"""

import os
import socket
import sys


def command(*words: str) -> bytes:
    """Return a command as Redis' protocol has it, whatever the words hold."""
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


try:
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=2) as connection:
        connection.sendall(command("AUTH", os.environ["REDIS_PASSWORD"]) + command("PING"))
        with connection.makefile("rb") as answers:
            login, ping = answers.readline().strip(), answers.readline().strip()
except OSError as error:
    sys.exit(f"Redis does not answer: {error}")
if (login, ping) != (b"+OK", b"+PONG"):
    # Not the answer to AUTH: it may quote what it was given.
    sys.exit(f"Redis says {ping.decode(errors='replace')}")
