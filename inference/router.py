"""vllm-router in front of several engines: ``python -m inference.router`` in the router's own environment.

Started through its Python class and not its command, because only the class can be told where to ask whether a caller's
key is valid. Without that everybody who reaches the port may take engines out, and put others in that then receive the
callers' questions and keys.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from inference.problem import Problem

POLICIES = ("cache_aware", "round_robin", "random", "power_of_two", "consistent_hash")
HEALTH_SECONDS = 2


def settings(
    workers: Sequence[str], host: str, port: int, metrics_port: int, policy: str, timeout: int
) -> dict[str, object]:
    """What vllm-router's class is called with; ``policy`` still by its name.

    Args:
        workers: the engines' addresses, as http://127.0.0.1:17821.
        host: address to listen on.
        port: its port.
        metrics_port: port of the router's own metrics, on loopback.
        policy: how an engine is chosen.
        timeout: seconds that an answer may take.
    """
    return {
        "worker_urls": list(workers),
        "host": host,
        "port": port,
        "policy": policy,
        "api_key_validation_urls": [f"{worker}/v1/models" for worker in workers],
        "prometheus_host": "127.0.0.1",
        "prometheus_port": metrics_port,
        "log_level": "warn",
        "request_timeout_secs": timeout,
        # Engines need minutes to come up at boot; the router then looks every second, not every half minute.
        "worker_startup_timeout_secs": 24 * 3600,
        "worker_startup_check_interval": 1,
        # A dead engine: one refused connection is enough to leave it out, a health check lets it in again.
        "health_check_interval_secs": HEALTH_SECONDS,
        "health_check_timeout_secs": 5,
        "health_failure_threshold": 2,
        "health_success_threshold": 1,
        "cb_failure_threshold": 1,
        "cb_success_threshold": 1,
        "cb_timeout_duration_secs": 2 * HEALTH_SECONDS,
        # A conversation stays with the engine that has it in its cache until that one has so many questions more than
        # another. The router's own 64 is for big GPUs: on a small one they would wait in line beside an idle engine.
        "balance_abs_threshold": 4,
        # Attempts in all. A question that kills an engine must not be carried to every one of them.
        "retry_max_retries": min(len(workers), 3),
        "retry_initial_backoff_ms": 50,
        "retry_max_backoff_ms": 1000,
        # Images come inside the requests; the engine's own limits are the stricter ones.
        "max_payload_size": 512 * 1024 * 1024,
    }


def serve(arguments: dict[str, object]) -> None:
    """Become the router; returns when it was asked to stop.

    Raises:
        Problem: no key.
    """
    if not os.environ.get("VLLM_API_KEY"):
        raise Problem("VLLM_API_KEY is empty. Remedy: start it with its env file.")
    from vllm_router.router import Router, policy_from_str

    threading.Thread(target=_show_key, args=(arguments["host"], arguments["port"]), daemon=True).start()
    Router(**{**arguments, "policy": policy_from_str(str(arguments["policy"]))}).start()


def _show_key(host: str, port: int) -> None:
    """Show the router the key as soon as it listens, which is when an engine is there to say that it is valid.

    The router remembers the answer for as long as it runs. Seen for the first time while no engine answers, the key
    would count as wrong from then on.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(
        f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/v1/models",
        headers={"Authorization": f"Bearer {os.environ['VLLM_API_KEY']}"},
    )
    while True:
        try:
            with opener.open(request, timeout=30):
                return
        except urllib.error.HTTPError as error:
            if error.code == 401:
                # Not to be mended from here, and every caller would be turned away: supervisor starts it afresh.
                print("no engine confirmed the key; starting again", file=sys.stderr, flush=True)
                os._exit(1)
            return
        except OSError:
            time.sleep(0.2)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m inference.router", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--metrics-port", type=int, required=True)
    parser.add_argument("--policy", choices=POLICIES, default=POLICIES[0])
    parser.add_argument("--timeout", type=int, default=1800, help="seconds that an answer may take")
    parser.add_argument("workers", nargs="+", metavar="http://HOST:PORT")
    options = parser.parse_args(argv)
    try:
        serve(
            settings(options.workers, options.host, options.port, options.metrics_port, options.policy, options.timeout)
        )
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
