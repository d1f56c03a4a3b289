"""What runs, as whom, and who can reach it."""

from tests.hosts.kit_host import KitHost


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
