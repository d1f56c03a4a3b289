"""Dify in containers: brought to what its files say, and proved to answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ansible.module_utils import kit_move
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_compose import ComposeProblem
from ansible.module_utils.kit_compose_engine import Project
from ansible.module_utils.kit_files import parse_env
from ansible.module_utils.kit_migrate import MigrationProblem, alive, make_signing_key
from ansible.module_utils.kit_move import MoveProblem
from ansible.module_utils.kit_report import render
from ansible.module_utils.kit_supervisor import Service, ServiceProblem, reconcile

DOCUMENTATION = r"""
module: kit_compose
short_description: Runs a Dify release's Compose file with the site's .env and override, and waits until it answers
description:
  - Holds the site's settings against the release's C(.env.example), and what Compose would run against what the kit
    promises (no default secret, no open port, no image without a tag, data in one folder), before anything is applied.
  - Starts nothing anew where nothing differs from what was applied and everything runs. One-shot services don't count.
  - Waits until every service runs, is healthy where it says so, and answers; then proves that both sides of each
    conversation have one key, and that the plugin daemon's container reaches the model's server.
  - Refuses an empty data folder where an earlier deploy had data.
  - Copies the plugin daemon's command line out of its image, and makes the site's key for signing plugins with it.
options:
  home: {type: path, required: true, description: The kit's folder on the host (kit_home).}
  state:
    type: str
    choices: [present, absent]
    default: present
    description: C(absent) removes the containers and networks of a host that has any; data stays.
  delete_data: {type: bool, default: false, description: With C(absent), also what the containers have written.}
  project: {type: str, description: The Compose project's name.}
  upstream: {type: path, description: The release's C(docker/), never changed.}
  settings: {type: path, description: "The site's values, a file of KEY='value' lines."}
  known: {type: list, elements: str, default: [], description: Names that the release reads beside its example's.}
  allowed: {type: list, elements: path, default: [], description: Files of the host that containers may read.}
  images: {type: path, description: How images are had, see kit_images.}
  ready: {type: list, elements: dict, default: [], description: "C(service) with C(http) or C(command) each."}
  ready_seconds: {type: int, default: 900, description: Time for all of them together.}
  cli:
    type: dict
    description: Where the plugin daemon's command line comes from and goes to.
    options:
      image: {type: str, required: true, description: The plugin daemon's image.}
      path: {type: path, required: true, description: Its place on the host.}
      key: {type: path, required: true, description: "The signing key's path, without C(.private.pem)."}
  endpoint:
    type: dict
    description: The model's server that the plugin daemon must reach.
    options:
      url: {type: str, required: true, description: "As http://172.17.0.1:17807/v1."}
      key: {type: str, required: true, description: What it is asked with.}
  take_over:
    type: dict
    description: Move the data of source mode, where that is the site's, into the containers. What was is put away.
    options:
      databases: {type: list, elements: str, required: true, description: "Dify's, the plugin daemon's, the vectors'."}
      services: {type: list, elements: str, required: true, description: Of source mode, but for PostgreSQL and Redis.}
  notices: {type: list, elements: str, default: [], description: Passed on to the summary.}
author: [Dify deployment kit]
"""

DIRECTORY, DATA, COMMAND = "etc/compose", "var/compose", "runtime/bin/kit-compose"
AWAY = "var/moved/compose-*"


def present(module: AnsibleModule) -> list[str]:
    """Bring the project up; return what was changed."""
    want, home = module.params, Path(module.params["home"])
    project = Project(
        want["project"],
        home / DIRECTORY,
        Path(want["upstream"]),
        home / DATA,
        Path(want["settings"]),
        set(want["known"]),
        [Path(path) for path in want["allowed"]],
    )
    if module.check_mode and not (project.upstream.exists() and Path(want["settings"]).exists()):
        return ["all services"]  # a rehearsal on a host that has nothing yet
    cli, done = want["cli"], []
    project.check_name()
    project.check_data()
    if not module.check_mode:
        # Mounted into the plugin daemon's container: before the files are held against each other.
        done += [f"image {name}" for name in project.have_images([cli["image"]], images(want))]
        done += ["plugin tool"] * project.copy_out(cli["image"], "/app/commandline", Path(cli["path"]))
        done += make_signing_key(cli["path"], Path(cli["key"]), home / "var/log/compose.log")
    text, config = project.prepare()
    if not module.check_mode:
        done += [f"image {name}" for name in project.have_images(project.missing_images(config), images(want))]
    if want["take_over"] is not None:
        done += take_over(module, project, text, config)
    done += project.up(text, config, check=module.check_mode)
    if not module.check_mode:
        project.await_ready(config, want["ready"], want["ready_seconds"])
        project.remember_data(config)
        project.check_effective()
        project.prove_endpoint("plugin_daemon", want["endpoint"]["url"], want["endpoint"]["key"])
    return done


def take_over(module: AnsibleModule, project: Project, text: str, config: dict[str, Any]) -> list[str]:
    """Fill the containers with source mode's data, if that is the site's; return what was done."""
    home, want, done = Path(module.params["home"]), module.params["take_over"], []
    kit_move.check_one(home)
    ours = [name for name in kit_move.OWN if (home / name).exists()]
    if not ours:
        return []
    if module.check_mode:
        return ["source mode's data moved into containers"]
    if alive(home, "source"):
        kit_move.check_servers(home)
        image = images(module.params)["cleaner"]
        kit_move.check_room(image, home, [home / name for name in ours])
        stop(home, want["services"])
        project.down()
        # What a move that broke off has left.
        project.data.mkdir(parents=True, exist_ok=True)
        kit_move.in_container(image, "find /to -mindepth 1 -maxdepth 1 -exec rm -rf {} +", to=(project.data, True))
        if databases := [name for name in kit_move.DATABASES if name in config["services"]]:
            project.start(text, config, "--no-deps", *databases)
        containers = kit_move.Containers((str(home / COMMAND),), parse_env(project.settings.read_text()))
        rows = kit_move.fill_containers(home, want["databases"], containers, image)
        done.append(f"{rows} rows and the files of source mode moved into containers")
        project.remember_data(config)
        (home / "current").unlink()
    # From here on the containers' data is the site's; what follows is done again where it broke off.
    stop(home, [*want["services"], "postgres", "redis"])
    return [*done, f"source mode's data put away to {kit_move.put_away(home, 'source', ours)}"]


def stop(home: Path, services: list[str]) -> None:
    """Stop and forget services of source mode."""
    reconcile([Service(name, state="absent") for name in services], home)


def images(want: dict[str, Any]) -> dict[str, Any]:
    """The description of how images are had."""
    spec: dict[str, Any] = json.loads(Path(want["images"]).read_text())
    return spec


def absent(module: AnsibleModule) -> list[str]:
    """Remove the project's containers, and its data if that is wished; return what was changed."""
    home = Path(module.params["home"])
    command, done = home / COMMAND, []
    # Without the two no deploy has come so far that it started anything.
    if command.exists() and (home / DIRECTORY / ".env").exists():
        if module.check_mode:
            return ["all services"]
        finished = module.run_command([str(command), "down", "--remove-orphans"])
        if finished[0]:
            module.fail_json(msg=f"`{command} down` ended with {finished[0]}: {finished[2].strip()}\nRemedy: docker ps")
        done.append("all services")
    if module.params["delete_data"] and not module.check_mode:
        # Also what a move to source mode has put away.
        for data in [path for path in (home / DATA, *sorted(home.glob(AWAY))) if path.exists()]:
            delete(module, home, data)
            done.append(f"data in {data}")
    return done


def delete(module: AnsibleModule, home: Path, data: Path) -> None:
    """Delete what containers have written, as root in one of an image that the host has: the files are their users'."""
    try:
        note = data / kit_move.CLEANER
        known = home / DIRECTORY / "images.json"
        image = note.read_text() if note.exists() else json.loads(known.read_text())["cleaner"]
        kit_move.in_container(image, "find /data -mindepth 1 -maxdepth 1 -exec rm -rf {} +", data=(data, True))
        shutil.rmtree(data)
    except (OSError, kit_move.MoveProblem) as problem:
        module.fail_json(msg=f"{data} could not be deleted: {problem}\nRemedy: as root, rm -r {data}")


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "home": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "delete_data": {"type": "bool", "default": False},
            "project": {"type": "str"},
            "upstream": {"type": "path"},
            "settings": {"type": "path"},
            "known": {"type": "list", "elements": "str", "default": []},
            "allowed": {"type": "list", "elements": "path", "default": []},
            "images": {"type": "path"},
            "ready": {"type": "list", "elements": "dict", "default": []},
            "ready_seconds": {"type": "int", "default": 900},
            "cli": {
                "type": "dict",
                "options": {
                    "image": {"type": "str", "required": True},
                    "path": {"type": "path", "required": True},
                    "key": {"type": "path", "required": True, "no_log": False},
                },
            },
            "endpoint": {
                "type": "dict",
                "options": {
                    "url": {"type": "str", "required": True},
                    "key": {"type": "str", "required": True, "no_log": True},
                },
            },
            "take_over": {
                "type": "dict",
                "options": {
                    "databases": {"type": "list", "elements": "str", "required": True},
                    "services": {"type": "list", "elements": "str", "required": True},
                },
            },
            "notices": {"type": "list", "elements": "str", "default": []},
        },
        required_if=[
            ("state", "present", ["project", "upstream", "settings", "images", "cli", "endpoint"]),
        ],
        supports_check_mode=True,
    )
    try:
        done = present(module) if module.params["state"] == "present" else absent(module)
    except ComposeProblem as problem:
        module.fail_json(msg=render(problem.problems, "What ran before still does, unless it is named here."))
    except (MigrationProblem, MoveProblem, ServiceProblem) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=bool(done), done=done, kit_notice=module.params["notices"])


if __name__ == "__main__":
    main()
