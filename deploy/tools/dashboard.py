"""Writes the Grafana dashboard for the model service, the gateway and Dify's plugin daemon.

usage: dashboard.py [--write]    without it, only says whether the file is up to date (status 1 if not)

In Grafana: Dashboards, New, Import, then this file; it asks for the Prometheus data source. The targets that Prometheus
must scrape for it: make metrics.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "dashboards" / "dify-kit.json"
FROM_PROMETHEUS = {"site", "host", "job", "instance"}
SITE = 'site=~"$site",host=~"$host"'


@dataclass(frozen=True)
class Panel:
    """A graph: what it shows, what the figures mean, Grafana's unit, and a query for each line or group of lines."""

    title: str
    description: str
    unit: str
    queries: dict[str, str]  # legend -> PromQL


def rate(metric: str, by: str = "host,instance", **labels: str) -> str:
    """How fast a counter grows, a second."""
    extra = "".join(f',{name}="{value}"' for name, value in labels.items())
    return f"sum by ({by}) (rate({metric}{{{SITE}{extra}}}[$__rate_interval]))"


def share(part: str, whole: str) -> str:
    """What part of one counter's events another counts, 0 to 1."""
    return f"{rate(part, 'host')} / {rate(whole, 'host')}"


def gauge(metric: str, by: str = "host,instance", **labels: str) -> str:
    """What a gauge says."""
    extra = "".join(f',{name}="{value}"' for name, value in labels.items())
    return f"sum by ({by}) ({metric}{{{SITE}{extra}}})"


def quantiles(metric: str, shares: Sequence[float] = (0.5, 0.95, 0.99), **labels: str) -> dict[str, str]:
    """Below what the given shares of a histogram's observations lie, over all engines."""
    of = rate(f"{metric}_bucket", "le", **labels)
    return {f"p{share * 100:g}": f"histogram_quantile({share}, {of})" for share in shares}


ENGINE = [
    Panel(
        "Questions",
        "Being answered, and waiting for a place (more than a few for long: more replicas, or a smaller context).",
        "short",
        {
            "running {{instance}}": gauge("vllm:num_requests_running"),
            "waiting {{instance}}": gauge("vllm:num_requests_waiting"),
        },
    ),
    Panel(
        "Tokens",
        "Read (prompts, images included) and written, a second.",
        "short",
        {
            "read {{instance}}": rate("vllm:prompt_tokens_total"),
            "written {{instance}}": rate("vllm:generation_tokens_total"),
        },
    ),
    Panel(
        "Time to first token",
        "From a question's arrival to the first token of its answer, waiting included.",
        "s",
        quantiles("vllm:time_to_first_token_seconds"),
    ),
    Panel(
        "Inter-token latency", "Between two tokens of an answer.", "s", quantiles("vllm:inter_token_latency_seconds")
    ),
    Panel("Whole answer", "From arrival to the last token.", "s", quantiles("vllm:e2e_request_latency_seconds")),
    Panel("Waiting", "In line before the model starts to read.", "s", quantiles("vllm:request_queue_time_seconds")),
    Panel(
        "KV cache in use",
        "At 1 new questions wait or running ones are put off.",
        "percentunit",
        {"{{instance}}": gauge("vllm:kv_cache_usage_perc")},
    ),
    Panel(
        "Answers put off",
        "Preemptions a second: the KV cache was full. Not 0 for long: answer fewer at a time, or a smaller context.",
        "short",
        {"{{instance}}": rate("vllm:num_preemptions_total")},
    ),
    Panel(
        "Answers by end",
        "stop: ended by itself; length: at its limit; abort: the caller left.",
        "short",
        {"{{finished_reason}}": rate("vllm:request_success_total", "finished_reason")},
    ),
    Panel(
        "Cache hits",
        "Share of prompt tokens found in the prefix cache, and of images in the multimodal cache.",
        "percentunit",
        {
            "prefixes": share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
            "images": share("vllm:mm_cache_hits_total", "vllm:mm_cache_queries_total"),
        },
    ),
    Panel(
        "Requests by status",
        "At the engine's API. 4xx: refused, with a reason; 5xx: the engine's own fault.",
        "short",
        {"{{status}}": rate("http_requests_total", "status", job="vllm")},
    ),
]

ROUTER = [
    Panel(
        "Engines that take questions",
        "As the router sees them; only where there is more than one replica.",
        "short",
        {"{{worker}}": gauge("vllm_router_worker_health", "worker")},
    ),
    Panel(
        "Answers by engine",
        "A second.",
        "short",
        {"{{worker}}": rate("vllm_router_cb_outcomes_total", "worker,outcome")},
    ),
    Panel(
        "Second attempts",
        "Questions a second that an engine failed and that went to another.",
        "short",
        {"{{route}}": rate("vllm_router_retries_total", "route")},
    ),
]

GATEWAY = [
    Panel(
        "Requests by status",
        "At the door for people and API clients.",
        "short",
        {"{{code}}": rate("caddy_http_request_duration_seconds_count", "code", handler="subroute")},
    ),
    Panel(
        "Duration",
        "Of whole requests; streamed answers count until their end.",
        "s",
        quantiles("caddy_http_request_duration_seconds", handler="subroute"),
    ),
    Panel(
        "In flight",
        "Requests that are being answered.",
        "short",
        {"{{host}}": gauge("caddy_http_requests_in_flight", "host", handler="subroute")},
    ),
    Panel(
        "Parts of Dify that answer",
        "1: yes. 0: Caddy counts it as down.",
        "short",
        {"{{upstream}}": gauge("caddy_reverse_proxy_upstreams_healthy", "host,upstream")},
    ),
]

DIFY = [
    Panel(
        "Plugin calls",
        "Questions to models and tools, a second, by how they ended.",
        "short",
        {"{{operation}} {{status}}": rate("plugin_invocations_total", "operation,status")},
    ),
    Panel("Duration of plugin calls", "", "s", quantiles("plugin_invocation_duration_seconds")),
    Panel(
        "Plugin daemon by status",
        "Requests a second.",
        "short",
        {"{{status}}": rate("plugin_http_requests_total", "status")},
    ),
]

ROWS = {
    "Model service (vLLM)": ENGINE,
    "Router (vllm-router)": ROUTER,
    "Gateway (Caddy)": GATEWAY,
    "Dify's plugin daemon": DIFY,
}


def asked(panels: Sequence[Panel]) -> dict[str, set[str]]:
    """The metrics that panels ask for, each with the labels that its queries name and a target itself must give."""
    found: dict[str, set[str]] = {}
    for panel in panels:
        for query in panel.queries.values():
            for by, metric, selector in re.findall(r"sum by \((.*?)\) \(+(?:rate\()?([\w:]+)\{(.*?)\}", query):
                labels = {*by.split(","), *re.findall(r"(\w+)=", selector)} - FROM_PROMETHEUS
                found.setdefault(metric, set()).update(labels)
    return found


def _panels() -> Iterator[dict[str, Any]]:
    source = {"type": "prometheus", "uid": "${source}"}
    number, top, width, height = 0, 0, 8, 8
    for row, panels in ROWS.items():
        number += 1
        where = {"x": 0, "y": top, "w": 24, "h": 1}
        yield {"id": number, "type": "row", "title": row, "collapsed": False, "panels": [], "gridPos": where}
        top += 1
        for index, panel in enumerate(panels):
            number += 1
            yield {
                "id": number,
                "type": "timeseries",
                "title": panel.title,
                "description": panel.description,
                "datasource": source,
                "gridPos": {"x": index % 3 * width, "y": top + index // 3 * height, "w": width, "h": height},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(ord("A") + line), "datasource": source, "expr": query, "legendFormat": legend}
                    for line, (legend, query) in enumerate(panel.queries.items())
                ],
            }
        top += -(-len(panels) // 3) * height


def _variable(name: str, of: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": {"query": of, "refId": name},
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 1,
    }


def dashboard() -> str:
    """The file's content."""
    content = {
        "title": "Dify deployment kit",
        "uid": "dify-kit",
        "tags": ["dify", "vllm"],
        "schemaVersion": 39,
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                _variable("site", "label_values(up, site)"),
                _variable("host", 'label_values(up{site=~"$site"}, host)'),
            ]
        },
        "panels": list(_panels()),
    }
    return json.dumps(content, indent=2) + "\n"


def main(argv: Sequence[str]) -> int:
    """Entry point."""
    if argv == ["--write"]:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(dashboard())
        return 0
    if FILE.is_file() and FILE.read_text() == dashboard():
        return 0
    print(f"{FILE} is not what {Path(__file__).name} writes. Remedy: run it with --write.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
