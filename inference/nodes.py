"""The hosts of one engine live and die together.

vLLM's nodes do not notice that another is gone: the others of rank 0's death never, rank 0 of another's death only at
the next question, which then waits for minutes. Each would keep its memory, and never find a successor of the dead one.
So every node holds a connection to rank 0, and whoever loses it ends; supervisor starts them anew, and they find each
other again. Not needed on Ray, which does this itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from typing import NoReturn

HELLO = b"kit node\n"


def watch(rank: int, address: str, port: int) -> None:
    """End this process's group as soon as another node is gone; returns at once, the watching goes on.

    Args:
        rank: of this node; 0 listens, the others connect.
        address: of the node of rank 0.
        port: where it listens.
    """
    if rank == 0:
        server = socket.create_server((address, port))
        threading.Thread(target=_receive, args=(server,), daemon=True).start()
    else:
        threading.Thread(target=_follow, args=(address, port), daemon=True).start()


def _receive(server: socket.socket) -> None:
    while True:
        connection, (address, *_) = server.accept()
        threading.Thread(target=_keep, args=(connection, address), daemon=True).start()


def _keep(connection: socket.socket, address: str) -> None:
    with contextlib.suppress(OSError):
        connection.settimeout(10)
        if connection.recv(len(HELLO), socket.MSG_WAITALL) == HELLO:
            _until_closed(connection)
            _end(f"the node at {address}")
    connection.close()  # of a stranger


def _follow(address: str, port: int) -> None:
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=10)
            break
        except OSError:  # rank 0 is not up yet
            time.sleep(0.5)
    with contextlib.suppress(OSError):
        connection.sendall(HELLO)
    _until_closed(connection)
    _end(f"the node of rank 0 ({address}:{port})")


def _until_closed(connection: socket.socket) -> None:
    # A host that lost its power says no goodbye: half a minute of silence counts as one.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.settimeout(None)
    with contextlib.suppress(OSError):
        while connection.recv(4096):
            pass


def _end(lost: str) -> NoReturn:
    print(f"{lost} is gone: ending, to be started again together", flush=True)
    # The engine's processes are all of this group, and hang in a calculation that will not end.
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("unreachable")
