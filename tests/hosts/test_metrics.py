"""What Prometheus can scrape of the host has the figures that the dashboard asks for."""

import dashboard

from tests.hosts.kit_host import KitHost

ROWS = {
    "vllm": "Model service (vLLM)",
    "vllm-router": "Router (vllm-router)",
    "caddy": "Gateway (Caddy)",
    "dify-plugin-daemon": "Dify's plugin daemon",
}
# Not there before the first such event.
AFTER_AN_EVENT = {"vllm_router_retries_total"}
# Not there where the gateway has nothing behind it.
OF_DIFY = {"caddy_reverse_proxy_upstreams_healthy"}


def test_every_target_has_what_the_dashboard_shows(kit: KitHost) -> None:
    assert kit.facts["metrics"]
    for target in kit.facts["metrics"]:
        address = target["bind"].replace("0.0.0.0", "127.0.0.1")
        url = f"http://{address}:{target['port']}{target['path']}"
        lacking = set(dashboard.asked(dashboard.ROWS[ROWS[target["job"]]])) - AFTER_AN_EVENT
        if kit.facts["dify_mode"] == "skip":
            lacking -= OF_DIFY
        lacking -= set(kit.probe("figures", url=url))
        assert not lacking, f"{url} lacks {sorted(lacking)}. Read `make logs`, then `make deploy`."
