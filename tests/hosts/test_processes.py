"""What runs, as whom, with which settings, and who can reach it."""

from pathlib import Path

import pytest
import yaml

from tests.hosts.kit_host import KitHost

RELEASES = Path(__file__).resolve().parents[2] / "deploy" / "releases"


def test_every_service_runs(kit: KitHost) -> None:
    down = [name for name in kit.services if name not in kit.supervised or kit.supervised[name].state != "RUNNING"]
    known = "; ".join(filter(None, map(kit.why, down)))
    assert not down, (
        f"not running: {', '.join(down)}. {known or f'Read `make logs SERVICE={down[0]}`'}, then `make deploy`."
    )


def test_no_service_is_unknown_to_the_deploy(kit: KitHost) -> None:
    strangers = set(kit.supervised) - set(kit.services)
    assert not strangers, f"supervisor also runs {sorted(strangers)}, which no deploy asked for. Run `make deploy`."


def test_processes_belong_to_the_service_user(kit: KitHost) -> None:
    uid = int(kit.run("id", "-u"))
    found = kit.probe("processes", supervisord=kit.supervisord)
    assert len(found) > len(kit.services), (
        f"only {len(found)} processes for {len(kit.services)} services and supervisord"
    )
    assert uid != 0, f"the service user {kit.user} is root. Set kit_user to an ordinary user."
    others = [f"pid {p['pid']} ({' '.join(p['argv'])[:60]}) runs as uid {p['uid']}" for p in found if p["uid"] != uid]
    assert not others, (
        f"not owned by {kit.user}: {others}. Run `make stop`, then `make deploy` as {kit.user} or as root."
    )


def test_services_run_with_what_is_configured(kit: KitHost) -> None:
    running = {name: program.pid for name, program in kit.supervised.items() if program.pid}
    answer = kit.probe("settings", services=running)
    assert answer["compared"], "no setting was compared"
    assert not answer["differ"], f"{answer['differ']}: running with other values than its file has. Run `make deploy`."


@pytest.mark.service("worker")
def test_dify_starts_as_its_release_does(kit: KitHost) -> None:
    release = yaml.safe_load((RELEASES / f"{kit.facts['release']}.yml").read_text())
    found = {p["pid"]: p["argv"] for p in kit.probe("processes", supervisord=kit.supervisord)}
    for service, app in {"worker": release["celery"]["app"], "api": release["gunicorn"]["app"]}.items():
        argv = found.get(kit.supervised[service].pid or 0, [])
        assert app in argv, f"{service} does not start {app}, but {argv}. Run `make deploy`."


def test_only_this_host_reaches_the_listeners(kit: KitHost) -> None:
    found = kit.probe("listeners", supervisord=kit.supervisord)
    missing = {name: port for name, port in kit.ports.items() if port not in {entry["port"] for entry in found}}
    assert not missing, f"nobody listens for {missing}. Read `make status`."
    # What the site itself has opened: gateway_bind, inference_bind.
    binds = {name.replace("_", "-"): address.replace("::", "0.0.0.0") for name, address in kit.facts["binds"].items()}
    opened = {(address, kit.ports[name]) for name, address in binds.items() if name in kit.ports}
    names = {program.pid: name for name, program in kit.supervised.items()}
    public = [
        f"{entry['address']}:{entry['port']} (pid {entry['pid']}, {names.get(entry['pid'], 'a child')})"
        for entry in found
        if not entry["local"] and (entry["address"].replace("::", "0.0.0.0"), entry["port"]) not in opened
    ]
    assert not public, f"reachable from other hosts: {public}. Bind it to 127.0.0.1; the gateway is the only door."
