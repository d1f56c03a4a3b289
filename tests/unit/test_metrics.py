"""What Prometheus is told to scrape, and what the dashboard asks it for."""

from __future__ import annotations

import json
import re
from typing import Any

import dashboard
import pytest

from deploy import kit


def state(**changes: Any) -> dict[str, Any]:
    host = {
        "connection": "ssh",
        "address": "192.0.2.11",
        "metrics": [
            {"job": "vllm", "port": 17807, "bind": "192.0.2.11", "path": "/metrics"},
            {"job": "caddy", "port": 17808, "bind": "127.0.0.1", "path": "/metrics"},
            {"job": "dify-plugin-daemon", "port": 17803, "bind": "127.0.0.1", "path": "/metrics/"},
        ],
    }
    return {"hosts": {"one": host | changes}}


def test_targets_are_what_file_sd_reads() -> None:
    found, notes = kit.targets("mysite", state())
    assert found == [
        {"targets": ["192.0.2.11:17807"], "labels": {"job": "vllm", "site": "mysite", "host": "one"}},
        {"targets": ["127.0.0.1:17808"], "labels": {"job": "caddy", "site": "mysite", "host": "one"}},
        {
            "targets": ["127.0.0.1:17803"],
            "labels": {
                "job": "dify-plugin-daemon",
                "site": "mysite",
                "host": "one",
                "__metrics_path__": "/metrics/",
            },
        },
    ]
    [note] = notes
    assert note.startswith("Only on one itself can be scraped: caddy (17808), dify-plugin-daemon (17803). ")


def test_this_machine_is_reached_by_loopback() -> None:
    found, _ = kit.targets("local", state(connection="local", address="localhost"))
    assert [target["targets"][0].partition(":")[0] for target in found] == ["127.0.0.1"] * 3


def test_a_record_of_an_older_kit(capsys: pytest.CaptureFixture[str]) -> None:
    old = state()
    del old["hosts"]["one"]["metrics"]
    with pytest.raises(SystemExit) as ended:
        kit.targets("local", old)
    assert ended.value.code == 2
    assert "Remedy: make deploy" in capsys.readouterr().err


def test_the_dashboard_is_up_to_date() -> None:
    assert dashboard.FILE.read_text() == dashboard.dashboard(), (
        "run: .venv/bin/python deploy/tools/dashboard.py --write"
    )


def test_every_query_is_understood() -> None:
    """Else a metric would escape the tests that look for it in the real programs' figures."""
    for panels in dashboard.ROWS.values():
        for panel in panels:
            for query in panel.queries.values():
                names = set(re.findall(r"[\w:]+(?=\{)", query))
                assert names
                assert names <= set(dashboard.asked([panel])), query


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(dashboard.dashboard())["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
