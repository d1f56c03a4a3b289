"""Check a site's settings on the controller, before any host is touched; see module_utils/kit_validate.py."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ansible.module_utils
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.action import ActionBase

# Ansible finds the kit's module_utils for modules only; an action plugin is imported as it is.
ansible.module_utils.__path__.append(str(Path(__file__).parents[1] / "module_utils"))
from ansible.module_utils import kit_certificate, kit_dify, kit_gateway
from ansible.module_utils import kit_validate as rules
from ansible.module_utils.kit_plugin import PackageError, describe
from ansible.module_utils.kit_release import open_advisories, validate_release
from ansible.module_utils.kit_report import Problem, render

ROOT = Path(__file__).resolve().parents[3]
#: File, variable, raw value, and the hosts that it is for.
Owned = tuple[str, str, Any, list[str]]
ASSURANCE = "No host was touched, nothing was changed."


def shorten(path: str) -> str:
    """A path as the person sees it: from the checkout on, where `make` is run."""
    full = Path(path).resolve()
    return str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else str(full)


def located(path: str, name: str) -> str:
    """``file, line n``: where a variable stands, found by its name (an encrypted file shows no lines)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return shorten(path)
    hit = re.search(rf"^[ \t]*[\"']?{re.escape(name)}[\"']?[ \t]*:", text, re.MULTILINE)
    return f"{shorten(path)}, line {text.count(chr(10), 0, hit.start()) + 1}" if hit else shorten(path)


def load_specs(loader: DataLoader, deploy: Path) -> dict[str, rules.Spec]:
    """The specification of every variable that a site may set: the kit's own and all roles'."""
    specs: dict[str, rules.Spec] = {}
    files = [deploy / "kit_variables.yml", *sorted(deploy.parent.glob("roles/*/meta/argument_specs.yml"))]
    for path in files:
        for entry in (loader.load_from_file(str(path)) or {}).get("argument_specs", {}).values():
            specs.update(entry.get("options") or {})
    return specs


class ActionModule(ActionBase):
    """Fails with the whole list of problems, or returns nothing worth reading."""

    TRANSFERS_FILES = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        self._notices: list[str] = []
        variables = task_vars or {}
        deploy = Path(variables["playbook_dir"])
        hosts = list(variables["groups"].get("kit", []))
        specs = load_specs(self._loader, deploy)
        removed = self._loader.load_from_file(str(deploy / "kit_variables.yml")).get("removed") or {}

        problems: list[Problem] = []
        inventory = ", ".join(shorten(source) for source in variables.get("ansible_inventory_sources") or [])
        problems += rules.check_hosts(hosts, inventory)
        settings = list(self._settings(variables, hosts))
        problems += rules.check_settings(settings, specs, removed)
        problems += self._check_secrets(settings, variables)
        broken = {setting.name for setting in settings if any(setting.name in problem.what for problem in problems)}
        for host in hosts:
            for problem in self._check_host(variables["hostvars"][host], specs, settings, broken, deploy):
                if problem not in problems:
                    problems.append(problem)
        if problems:
            raise AnsibleActionFail(render(problems, ASSURANCE))
        return {"changed": False, "kit_notice": self._notices}

    # --- what the site sets -----------------------------------------------------------------------
    def _settings(self, variables: Mapping[str, Any], hosts: list[str]) -> Iterator[rules.Setting]:
        """Every variable that the site sets, with its place and its value as a host sees it."""
        extra = self._task.get_variable_manager().extra_vars
        for name, raw in extra.items():
            value, known = self._seen(variables, hosts, name, raw)
            yield rules.Setting(name, value, "command line (-e)", from_command_line=True, known=known)
        seen: set[tuple[str, str]] = set()
        for path, name, raw, owners in self._files(variables):
            if (path, name) in seen or name in extra:
                continue
            seen.add((path, name))
            concerned = [host for host in hosts if host in owners]
            value, known = self._seen(variables, concerned, name, raw)
            yield rules.Setting(name, value, located(path, name), known=known)

    def _files(self, variables: Mapping[str, Any]) -> Iterator[Owned]:
        """File, name, raw value and the hosts concerned, of everything in a site's folder."""
        groups: Mapping[str, list[str]] = variables["groups"]
        for source in variables.get("ansible_inventory_sources") or []:
            folder = source if os.path.isdir(source) else os.path.dirname(source)
            yield from self._inventory_vars(source, groups)
            owners = [("group_vars", group, hosts) for group, hosts in groups.items()]
            owners += [("host_vars", host, [host]) for host in {h for members in groups.values() for h in members}]
            for kind, owner, concerned in owners:
                for path in self._loader.find_vars_files(os.path.join(folder, kind), owner):
                    where = os.fsdecode(path)
                    for name, raw in self._mapping(where).items():
                        yield where, str(name), raw, concerned

    def _inventory_vars(self, source: str, groups: Mapping[str, list[str]]) -> Iterator[Owned]:
        """What stands in the inventory's own files: ``vars:`` of groups, and variables under a host."""
        paths = sorted(Path(source).glob("*.y*ml")) if os.path.isdir(source) else [Path(source)]
        for path in paths:
            pending = list(self._mapping(str(path)).items()) if path.is_file() else []
            while pending:
                group, content = pending.pop(0)
                content = content or {}
                for name, raw in (content.get("vars") or {}).items():
                    yield str(path), name, raw, groups.get(group, [])
                for host, values in (content.get("hosts") or {}).items():
                    for name, raw in (values or {}).items():
                        yield str(path), name, raw, [host]
                pending += list((content.get("children") or {}).items())

    def _mapping(self, path: str) -> dict[str, Any]:
        content = self._loader.load_from_file(path, cache="all", trusted_as_template=True)
        return content if isinstance(content, dict) else {}

    def _seen(self, variables: Mapping[str, Any], hosts: list[str], name: str, raw: Any) -> tuple[Any, bool]:
        """The value as the first host concerned sees it, and whether it is known before facts are."""
        if "{{" not in str(raw):
            return raw, True
        for host in hosts:
            try:
                return variables["hostvars"][host][name], True
            except (AnsibleError, KeyError):
                continue  # it needs facts or secrets that are not there yet
        return raw, False

    # --- checks that need values ------------------------------------------------------------------
    def _check_host(
        self,
        host: Mapping[str, Any],
        specs: Mapping[str, rules.Spec],
        settings: list[rules.Setting],
        broken: set[str],
        deploy: Path,
    ) -> Iterator[Problem]:
        """What only shows when all values of a host stand side by side."""
        where = {setting.name: setting.where for setting in settings}

        def value(name: str) -> Any:
            try:
                return host[name]
            except (AnsibleError, KeyError):
                return None

        if "dify_release" not in broken:
            yield from self._check_release(str(value("dify_release")), value, where, deploy)
        named = [name for name in specs if name.endswith("_port")]
        # dify_source_plugin_daemon_debug_port tells one role where another's plugin_daemon_debug_port listens.
        # A server that the kit does not run has its port on another host, or is there already: preflight asks it.
        others = {f"{part}_port" for part in ("postgres", "redis") if value(f"{part}_source") == "external"}
        ports = {
            name: value(name)
            for name in named
            if name not in others and not any(name.endswith(f"_{other}") for other in named)
        }
        if not broken & {*ports, "kit_port_base"}:
            place = ", ".join(dict.fromkeys(where[name] for name in [*ports, "kit_port_base"] if name in where))
            numbers = {name: int(port) for name, port in ports.items() if re.fullmatch(r"\d+", str(port))}
            yield from rules.check_ports(numbers, place or "deploy/group_vars/all.yml")
        names = ["inference_endpoint", "provider_endpoint", "provider_api_key", "provider_model", "provider_plugin"]
        names += ["provider_package", "dify_source_marketplace"]
        if value("dify_mode") != "skip" and not broken & set(names):
            yield from rules.check_provider({name: value(name) for name in names}, where)
        names = ["provider_plugin", "provider_package", "dify_plugins", "plugin_daemon_package_mb"]
        if value("dify_mode") != "skip" and not broken & set(names):
            yield from self._check_plugins(value, where)
        names = ["sandbox_mode", "sandbox_url", "sandbox_api_key"]
        if value("dify_mode") == "source" and not broken & set(names):
            chosen = {name: value(name) or specs[name].get("default") for name in names}
            yield from rules.check_sandbox(chosen, where)
        names = [name for name in specs if name.startswith("dify_compose_")]
        if value("dify_mode") == "compose" and not broken & set(names):
            chosen = {name: value(name) or specs[name].get("default") for name in names}
            servers = {
                f"{part}_{what}": value(f"{part}_{what}") for part in rules.EXTERNAL_ONLY for what in ("source", "host")
            }
            yield from rules.check_compose(chosen | servers, where)
        names = [name for name in specs if name.startswith(rules.PART_NAMES)]
        if not broken & set(names):
            parts = {name: value(name) for name in names}
            release = deploy / "releases" / f"{value('dify_release')}.yml"  # an unknown one is said above
            known = self._mapping(str(release)) if value("dify_mode") == "source" and release.is_file() else {}
            yield from rules.check_parts(parts, where, str(known.get("postgres", {}).get("newest", "")))
        names = ["inference_model", "inference_weights_source", "inference_weights_folder", "inference_hub_mirror"]
        if value("inference_endpoint") != "external" and not broken & set(names):
            files = (deploy.parent / "inference" / "catalog").glob("*.yml")
            catalog = {path.stem: self._mapping(str(path)) for path in files}
            chosen = {name: value(name) or specs[name].get("default") for name in names}
            yield from rules.check_model(chosen, where, catalog)
        yield from self._check_gateway(value, where, broken)
        if value("dify_mode") != "skip" and not broken & {"dify_source_env", "plugin_daemon_env", "dify_release"}:
            yield from self._check_env(value, where, deploy)
        if not broken & {"dify_source_mail", "dify_source_mail_password"}:
            place = where.get("dify_source_mail", where.get("dify_source_mail_password", "dify_source_mail"))
            password = value("dify_source_mail_password")
            yield from rules.check_mail(value("dify_source_mail") or {}, str(password or ""), place)
        home, cache = value("kit_home"), value("kit_cache")
        if home and cache and not broken & {"kit_home", "kit_cache", "kit_user_home"}:
            yield from rules.check_folders(home, cache, where.get("kit_home") or where.get("kit_cache") or "kit_home")

    def _check_plugins(self, value: Any, where: Mapping[str, str]) -> Iterator[Problem]:
        """The packages are on this machine and what they should be: a deploy needs them at its very end."""
        place, plugins = where.get("dify_plugins", "dify_plugins"), value("dify_plugins") or []
        problems = rules.check_plugins(plugins, place)
        yield from problems
        files = [(f"dify_plugins[{number}]", p["file"], place, "") for number, p in enumerate(plugins) if "file" in p]
        if package := value("provider_package"):
            ids = {"kit": "dify-kit/kit_inference", "official": "langgenius/openai_api_compatible"}
            expected = ids[value("provider_plugin") or "kit"]
            files.append(("provider_package", package, where.get("provider_package", "provider_package"), expected))
        for name, file, there, wanted in files if not problems else []:
            described: tuple[str, int] | PackageError
            try:
                described = describe(Path(str(file)), shorten(str(file)))
            except PackageError as error:
                described = error
            yield from rules.check_package(
                name, str(file), there, described, wanted, int(value("plugin_daemon_package_mb") or 300)
            )

    def _check_gateway(self, value: Any, where: Mapping[str, str], broken: set[str]) -> Iterator[Problem]:
        """How people reach the site, and the certificate that they are shown."""
        defaults: dict[str, Any] = {"gateway_bind": "127.0.0.1", "inference_bind": "127.0.0.1", "gateway_tls": "none"}
        defaults |= {"gateway_trusted_proxies": [], "dify_public_url": ""}
        defaults |= {"gateway_tls_certificate": "", "gateway_tls_key": ""}
        if broken & set(defaults):
            return
        # A role's defaults are not to be seen from here; the empty text is a value.
        values = {name: default if value(name) is None else value(name) for name, default in defaults.items()}
        problems = kit_gateway.check(values, where)
        yield from problems
        if problems or values["gateway_tls"] != "files":
            return
        content = []
        for name in ("gateway_tls_certificate", "gateway_tls_key"):
            path = Path(values[name])
            try:
                content.append(path.read_bytes())
            except OSError as error:
                what = f"{name} names {path}, which cannot be read: {error.strerror}."
                yield Problem(what, where[name], "correct the path; the file is on the machine that deploys.")
                continue
            if name == "gateway_tls_key":
                yield from rules.check_mode_bits(str(path), path.stat().st_mode)
        if len(content) == 2:
            host = urlsplit(values["dify_public_url"]).hostname or ""
            files = (values["gateway_tls_certificate"], values["gateway_tls_key"])
            found, notices = kit_certificate.examine(*content, host, datetime.now(UTC), files)
            yield from found
            self._notices += [notice for notice in notices if notice not in self._notices]

    def _check_env(self, value: Any, where: Mapping[str, str], deploy: Path) -> Iterator[Problem]:
        """Dify's own settings: known to the release, not the kit's to set, and of the site's scheme."""
        file = deploy / "releases" / "env-keys" / f"{value('dify_release')}.yml"
        keys = self._mapping(str(file)) if file.is_file() else {}
        own = {"dify_source_env": ("api", "web"), "plugin_daemon_env": ("plugin_daemon",)}
        for name, components in own.items():
            settings = value(name) or {}
            for line in kit_dify.own_settings(name, settings, keys, components) if keys else []:
                what, _, remedy = line.partition(" Remedy: ")
                yield Problem(what, where.get(name, name), remedy)
            yield from kit_gateway.check_env_schemes(value("dify_public_url") or "", settings, where.get(name, name))

    def _check_release(self, release: str, value: Any, where: Mapping[str, str], deploy: Path) -> Iterator[Problem]:
        place = where.get("dify_release", "dify_release in deploy/group_vars/all.yml")
        files = {path.stem: path for path in (deploy / "releases").glob("*.yml")}
        problems = rules.check_release(release, files, place)
        yield from problems
        if problems or value("dify_mode") == "skip":
            return
        data = self._mapping(str(files[release]))
        unsound = validate_release(data)
        for line in unsound:
            yield Problem(
                f"The data of Dify {release} is not as it must be: {line}.",
                shorten(str(files[release])),
                "correct the file, or draft it again: make release-file VERSION=" + release,
            )
        if not unsound:
            for advisory in open_advisories(data, value("dify_acknowledged_advisories") or []):
                yield rules.advisory_problem(release, advisory, place)

    def _check_secrets(self, settings: list[rules.Setting], variables: Mapping[str, Any]) -> Iterator[Problem]:
        secrets = {setting.name: setting for setting in settings if setting.name.startswith(rules.SECRET_PREFIX)}
        values = {name: str(setting.value) for name, setting in secrets.items() if setting.known}
        place = next((setting.where.split(",")[0] for setting in secrets.values()), "")
        yield from rules.check_distinct_secrets(values, place)
        for source in variables.get("ansible_inventory_sources") or []:
            folder = source if os.path.isdir(source) else os.path.dirname(source)
            path = Path(folder, "group_vars", "kit", "secrets.yml")
            if path.is_file():
                yield from rules.check_mode_bits(shorten(str(path)), path.stat().st_mode)
        for file, name, raw, _ in self._files(variables):
            if name in rules.FOREIGN_KEYS and raw and "{{" not in str(raw) and not file.endswith("/secrets.yml"):
                yield from rules.check_key_file(name, shorten(file), os.stat(file).st_mode)
