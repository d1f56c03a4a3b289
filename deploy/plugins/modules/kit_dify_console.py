"""Dify's workspace as a site wants it: admin, plugin, model, default model, sample app and its key, in one session."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_console import Console, ConsoleError
from ansible.module_utils.kit_files import FileProblem, apply, entry_from_dict
from ansible.module_utils.kit_network import hide
from ansible.module_utils.kit_openai import Endpoint, Served

DOCUMENTATION = r"""
module: kit_dify_console
short_description: Admin, plugin, model, default model, sample app and its key of a Dify workspace
description:
  - Logs in once. A refused password is remembered and not sent again within a day, because Dify locks an account
    after five.
  - What people changed in Dify stays - another default model, another model of the sample app - and is reported.
  - What this module registered before and the site no longer has (a model, its plugin) leaves Dify.
  - What a model can do is asked of its server; Dify gets it in words, because it keeps what a plugin says for an hour.
  - Dify never shows a stored secret, so a fingerprint of what was set is kept in C(state_file).
  - Returns C(changes), C(app_id), C(model), C(context) in tokens, C(vision), C(images) (the most with one question;
    0 where the model doesn't see), C(tools), and C(url).
options:
  url: {type: str, required: true, description: "Where this host reaches Dify."}
  ca_file: {type: path, description: "Root certificates for https addresses."}
  environment: {type: dict, default: {}, description: Proxies and certificates on the way out.}
  wait_seconds: {type: int, default: 180, description: "How long Dify may take to answer at first."}
  admin:
    type: dict
    required: true
    description: "The first account: made if Dify has none, else logged in with."
    options:
      email: {type: str, required: true, description: Address.}
      name: {type: str, required: true, description: Name.}
      password: {type: str, required: true, description: "At least 8 characters with letters and digits."}
      language: {type: str, required: true, description: "Language of the interface, as en-US."}
  plugin:
    type: dict
    required: true
    description: "What kit_difypkg returned, and C(install_seconds)."
    options:
      package: {type: path, description: "Signed package; none: the newest of Dify's marketplace, unless installed."}
      identifier: {type: str, default: "", description: "author/name:version@checksum."}
      install_seconds: {type: int, default: 600, description: "How long its Python packages may take."}
  plugins:
    type: list
    elements: dict
    default: []
    description: "More plugins, as C(package) and C(identifier) each; one that leaves the list is uninstalled."
  provider: {type: str, required: true, description: "author/plugin/provider."}
  model:
    type: dict
    required: true
    description: The model to register.
    options:
      name: {type: str, required: true, description: "Its name at the server; empty: the first that it lists."}
      endpoint: {type: str, required: true, description: "The server's address, as http://host:8000/v1."}
      api_key: {type: str, required: true, description: "The server's key, may be empty."}
      context_size: {type: int, required: true, description: "In tokens; 0: what the server allows."}
      vision_support: {type: str, required: true, description: "auto, support or no_support."}
      max_images: {type: int, required: true, description: "The most with one question; 0: what the server allows."}
      tool_calling: {type: str, required: true, description: "auto, support or no_support."}
      modalities: {type: list, elements: str, default: [], description: "What the server must be able to: image."}
      external: {type: bool, default: false, description: "Whether somebody else runs it: through the proxies."}
  app: {type: dict, required: true, description: "A chat app's description (Dify DSL); the model is filled in."}
  state_file: {type: path, required: true, description: "Fingerprints and ids of what was set. Mode 0600."}
  key_file: {type: path, required: true, description: "Receives DIFY_APP_KEY. Mode 0600."}
  summary: {type: list, elements: str, default: [], description: "Lines for the summary, before the module's own."}
author: [Dify deployment kit]
"""

CREDENTIAL_NAME = "dify-kit"
OFFICIAL = "langgenius/openai_api_compatible/openai_api_compatible"
# Tokens of an answer in the sample app; of one that comes after thoughts.
ANSWER_TOKENS, THOUGHT_TOKENS = 512, 4096
# Dify counts wrong passwords for a day and locks at five.
REFUSED_SECONDS = 24 * 3600


def digest(*parts: str) -> str:
    """A fingerprint from which a secret cannot be read; slow on purpose, as people choose passwords."""
    text = json.dumps(parts).encode()
    return hashlib.scrypt(text, salt=b"dify-kit", n=2**12, r=8, p=1, dklen=32).hex()


def credentials_for(provider: str, endpoint: str, api_key: str, model: Served, context: int) -> dict[str, str]:
    """A model's settings in the words of its provider's form."""
    if provider != OFFICIAL:
        return {
            "endpoint_url": endpoint,
            "api_key": api_key,
            "context_size": str(context),
            "vision_support": "support" if model.images else "no_support",
            "max_images": str(model.images or ""),
            "tool_calling": "support" if model.tools else "no_support",
        }
    # Its own answers are 4096 tokens of context and no vision, whatever the server says; none is left to it.
    return {
        "endpoint_url": endpoint,
        "api_key": api_key,
        "mode": "chat",
        "context_size": str(context),
        "max_tokens_to_sample": str(context),
        "vision_support": "support" if model.images else "no_support",
        "function_calling_type": "tool_call" if model.tools else "no_call",
        "stream_function_calling": "supported" if model.tools else "not_supported",
        "stream_mode_delimiter": "\\n\\n",
    }


def summary(want: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """What people want to know of a workspace that is ready."""
    images = result.get("images") or 0
    sees = f"sees images ({images} with a question)" if images else "text only"
    return [
        *want["summary"],
        f"Model in Dify: {result['model']} at {want['model']['endpoint']}, context {result['context']} tokens, {sees}",
        f"Sample app: {want['app']['app']['name']}; its key for programs: {want['key_file']}",
    ]


class Workspace:
    """Brings a workspace to what the parameters say, step by step; collects what was changed and what is notable."""

    def __init__(self, parameters: dict[str, Any], *, check: bool) -> None:
        self.want = parameters
        self.check = check
        self.console = Console(parameters["url"], parameters["ca_file"])
        self.changes: list[str] = []
        self.notices: list[str] = []
        self.diff: list[dict[str, str]] = []
        self.result: dict[str, Any] = {}
        self._state_path = Path(parameters["state_file"])
        try:
            self.state: dict[str, Any] = json.loads(self._state_path.read_text())
        except (OSError, ValueError):
            self.state = {}

    def run(self) -> None:
        """All steps. Raises ConsoleError at the first that fails; what was done stays done and recorded."""
        try:
            served = self.served()
            if not self.admin():
                return
        except ConsoleError as error:
            if self.check and error.status == 0:
                # Before the first deploy nothing runs yet that could be asked.
                self._changed("workspace", "not there", "set up")
                return
            raise
        self.plugin()
        self.plugins()
        self.model(served)
        self.default_model(served.name)
        self.app(served)
        self.retire()

    # --- steps --------------------------------------------------------------------------------------------------------
    def served(self) -> Served:
        """The model with what it can do, as the server says and the site wants it."""
        want = self.want["model"]
        endpoint = Endpoint(want["endpoint"], want["api_key"], self.want["ca_file"], external=want["external"])
        said = endpoint.model(want["name"])
        if "image" in want["modalities"] and not said.images:
            raise ConsoleError(
                f"{said.name} at {want['endpoint']} should see images, but its server refuses even a small one.",
                "`make logs SERVICE=inference` shows how the server was started and why it refuses.",
            )
        if not (want["context_size"] or said.context):
            raise ConsoleError(
                f"{want['endpoint']} does not tell how long a conversation with {said.name} may be.",
                "set provider_context_size to the model's context length in tokens.",
            )
        images = min(said.images, want["max_images"] or said.images)
        if want["vision_support"] != "auto":
            images = 0 if want["vision_support"] == "no_support" else images or want["max_images"] or 1
        tools = said.tools if want["tool_calling"] == "auto" else want["tool_calling"] == "support"
        context = min(filter(None, [want["context_size"], said.context]))
        served = Served(said.name, context, images, tools, said.reasons)
        self.result.update(model=served.name, context=context, images=images, tools=tools)
        return served

    def admin(self) -> bool:
        """Makes the admin or logs in. False where a check ends here because there is nobody to log in as."""
        admin = self.want["admin"]
        if not self.console.wait(0 if self.check else self.want["wait_seconds"]):
            self._changed("admin", "none", admin["email"])
            if self.check:
                return False
            self.console.setup(admin["email"], admin["name"], admin["password"], admin["language"])
        refused = self.state.get("refused_login") or {"at": 0, "fingerprint": ""}
        ago = time.time() - refused["at"]
        if ago < REFUSED_SECONDS and refused["fingerprint"] == digest(admin["email"], admin["password"]):
            raise ConsoleError(
                f"Dify refused this password of {admin['email']} {ago / 60:.0f} minutes ago; it is not tried again, "
                "because Dify locks an account after five wrong ones.",
                "set kit_secret_admin_password in the site's secrets.yml (or dify_admin_email) to what is valid in "
                f"Dify. If the password has become right since, delete {self._state_path}.",
            )
        try:
            self.console.login(admin["email"], admin["password"])
        except ConsoleError as error:
            if error.status in (400, 401, 403):
                fingerprint = digest(admin["email"], admin["password"])
                self._remember(refused_login={"at": int(time.time()), "fingerprint": fingerprint})
            raise
        self._remember(refused_login=None)
        return True

    def plugin(self) -> None:
        """Installs the plugin; another content than the installed one replaces it."""
        wanted, package = self.want["plugin"]["identifier"], self.want["plugin"]["package"]
        plugin_id = _plugin(self.want["provider"])
        found = self.console.installed_plugin(plugin_id)
        installed = found["plugin_unique_identifier"] if found else ""
        if (wanted and installed == wanted) or (installed and not package):
            return
        self._changed("plugin", installed or "none", wanted or f"{plugin_id}, packaged anew or of the marketplace")
        if self.check:
            return
        if package:
            self._install(package, found)
        else:
            self.console.install_from_marketplace(plugin_id, self.want["plugin"]["install_seconds"])

    def plugins(self) -> None:
        """Installs the site's other plugins, and takes out those that it has no longer."""
        wanted = {
            plugin["identifier"].partition(":")[0]: plugin for plugin in self.want["plugins"] if plugin["identifier"]
        }
        if len(wanted) < len(self.want["plugins"]):  # not packaged yet: only in a check
            self._changed("plugins", "not there", "installed")
        kept = self.state.get("plugins", [])
        gone = sorted(set(kept) - set(wanted) - {_plugin(self.want["provider"])})
        installed = self.console.installed_plugins([*wanted, *gone]) if wanted or gone else {}
        for plugin_id, plugin in wanted.items():
            found = installed.get(plugin_id)
            before = found["plugin_unique_identifier"] if found else "none"
            if before != plugin["identifier"]:
                self._changed(f"plugin {plugin_id}", before, plugin["identifier"])
                if not self.check:
                    self._install(plugin["package"], found)
            if plugin_id not in kept:
                # Noted one by one: what an interrupted run has installed is known to the next one.
                kept = [*kept, plugin_id]
                self._remember(plugins=kept)
        for plugin_id in gone:
            if plugin_id in installed:
                before = str(installed[plugin_id]["plugin_unique_identifier"])
                self._changed(f"plugin {plugin_id}", before, "gone: no longer in dify_plugins")
                if not self.check:
                    self.console.uninstall_plugin(installed[plugin_id]["id"])
        self._remember(plugins=sorted(wanted) or None)

    def model(self, served: Served) -> None:
        """Registers the model and proves that Dify offers it."""
        name, context, wanted = served.name, int(served.context or 0), self.want["model"]
        credentials = credentials_for(self.want["provider"], wanted["endpoint"], wanted["api_key"], served, context)
        provider = self.want["provider"]
        if self.check and self.changes:
            return  # what follows from changes that were not made cannot be asked
        known = self.console.model_credential(provider, name)
        ours = self._ours(known)
        shown = self.console.model_credential(provider, name, ours)["credentials"] if ours else None
        fingerprint = digest(provider, name, json.dumps(credentials, sort_keys=True))
        kept = self.state.get("credentials")
        if ours is None or kept != {"set": fingerprint, "shown": self._seen(shown)}:
            # A hidden secret looks the same as another one: say that it is set anew, never what it is.
            before = {**shown, "api_key": "(hidden)"} if shown else "none"
            after = {**credentials, "api_key": "(set anew)" if wanted["api_key"] else ""}
            self._changed(f"model {name}", before, after)
            if self.check:
                return
            self.console.save_model_credential(provider, name, CREDENTIAL_NAME, credentials, ours)
            known = self.console.model_credential(provider, name)
            ours = self._ours(known)
            shown = self.console.model_credential(provider, name, ours)["credentials"]
            self._remember(credentials={"set": fingerprint, "shown": self._seen(shown)})
        registered = self.state.get("registered", [])
        self._remember(registered=registered if [provider, name] in registered else [*registered, [provider, name]])
        if ours and known["current_credential_id"] != ours:
            self._changed(f"credentials of {name}", str(known.get("current_credential_name")), CREDENTIAL_NAME)
            if self.check:
                return
            self.console.use_model_credential(provider, name, ours)
        offered = self.console.models().get((provider, name))
        if offered is None or offered.get("status") != "active":
            raise ConsoleError(
                f"Dify has {name!r} registered but does not offer it (status: {offered and offered.get('status')}).",
                "is it switched off in Dify (Settings, Model Provider)? Otherwise `make logs SERVICE=plugin-daemon`.",
            )
        self.result["vision"] = "vision" in (offered.get("features") or [])
        self.result["context"] = offered["model_properties"].get("context_size", context)
        if served.images and not self.result["vision"]:
            raise ConsoleError(
                f"{name} sees images, but Dify does not know it.", "`make logs SERVICE=plugin-daemon` has the reason."
            )

    def default_model(self, name: str) -> None:
        """Makes the model the default one unless people chose another."""
        wanted = (self.want["provider"], name)
        if self.check and self.changes:
            return
        current = self.console.default_model()
        kept = self.state.get("default_model")
        if current != wanted:
            if current and kept and list(current) != kept:
                self.notices.append(f"Dify's default model is {current[1]}, chosen there; the kit's is {name}.")
                return
            self._changed("default model", current[1] if current else "none", name)
            if self.check:
                return
            self.console.set_default_model(*wanted)
        self._remember(default_model=list(wanted))

    def app(self, served: Served) -> None:
        """Imports the sample app once, follows the site's model, keeps a key for it."""
        if self.check and self.changes:
            return
        dsl, name = self.want["app"], served.name
        tokens = min(int(served.context or 0) // 2, THOUGHT_TOKENS if served.reasons else ANSWER_TOKENS)
        chosen = {"provider": self.want["provider"], "name": name, "images": served.images, "tokens": tokens}
        kept = self.state.get("app") or {}
        app_id = kept.get("id")
        app = self.console.app(app_id) if app_id else None
        if app is None:
            app_id = self.console.app_named(dsl["app"]["name"])
            app = self.console.app(app_id) if app_id else None
        if app is None:
            self._changed("sample app", "none", dsl["app"]["name"])
            if self.check:
                return
            filled = json.loads(json.dumps(dsl))
            self._choose(filled["model_config"], chosen)
            app_id = self.console.import_app(filled)
        else:
            settings = app["model_config"]
            current = settings["model"]
            if kept.get("chosen") != chosen:
                before = kept.get("chosen") or chosen
                if (current["provider"], current["name"]) == (before["provider"], before["name"]):
                    self._changed(
                        "sample app's model", current["name"], name + (", with images" if served.images else "")
                    )
                    if self.check:
                        return
                    self._choose(settings, chosen)
                    self.console.configure_app(str(app_id), settings)
                    current = settings["model"]
            if (current["provider"], current["name"]) != (chosen["provider"], chosen["name"]):
                self.notices.append(f"The sample app uses {current['name']}, chosen in Dify; the kit's is {name}.")
        self._remember(app={"id": app_id, "chosen": chosen})
        self.result["app_id"] = app_id
        self._key(str(app_id))

    def retire(self) -> None:
        """Takes out of Dify what earlier runs registered and the site has no longer: models, plugins without one."""
        if self.check and self.changes:
            return
        current = [self.want["provider"], self.result["model"]]
        gone = [(provider, name) for provider, name in self.state.get("registered", []) if [provider, name] != current]
        if not gone:
            return
        known = self.console.models()
        for provider, name in gone:
            if (provider, name) in known:
                users = self.console.apps_with(provider, name)
                if users:
                    apps = ", ".join(users)
                    self.notices.append(f"The model {name} is no longer served; choose another in these apps: {apps}.")
                self._changed(f"model {name}", "registered", "gone: no longer served")
                if not self.check:
                    self.console.remove_model(provider, name)
        for provider in {provider for provider, _ in gone} - {self.want["provider"]}:
            left = [model for owner, model in known if owner == provider and (provider, model) not in gone]
            installed = self.console.installed_plugin(_plugin(provider))
            if installed and not left:
                self._changed("plugin", str(installed["plugin_unique_identifier"]), "gone: the site uses another")
                if not self.check:
                    self.console.uninstall_plugin(installed["id"])
        self._remember(registered=[current])

    def _key(self, app_id: str) -> None:
        """Keeps a valid key of the app in the key file."""
        path = Path(self.want["key_file"])
        try:
            line = next(line for line in path.read_text().splitlines() if line.startswith("DIFY_APP_KEY="))
            kept = line.partition("=")[2].strip("'\"")
        except (OSError, StopIteration):
            kept = ""
        keys = self.console.app_keys(app_id)
        if not kept or kept not in keys:
            self._changed("sample app's key", "none" if not kept else "unknown to Dify", f"kept in {path}")
            if self.check:
                return
            kept = keys[0] if keys else self.console.make_app_key(app_id)
        # Also where nothing is new: the file's mode is this file's secrecy.
        entry = entry_from_dict({"dest": str(path), "env": {"DIFY_APP_KEY": kept}, "secret": True}, path.parent)
        apply(entry, base=path.parent, check=self.check)

    def _install(self, package: str, found: dict[str, Any] | None) -> None:
        # Uploading checks the signature: a package that is refused leaves the installed one in place.
        identifier = self.console.upload_plugin(Path(package))
        if found:
            # The daemon's upgrade knows marketplace and GitHub packages only; Dify's own page does it this way too.
            self.console.uninstall_plugin(found["id"])
        self.console.install_plugin(identifier, self.want["plugin"]["install_seconds"])

    # --- small parts --------------------------------------------------------------------------------------------------
    @staticmethod
    def _seen(shown: Any) -> str:
        # Even a masked secret begins and ends like the real one.
        return digest(json.dumps(shown, sort_keys=True))

    @staticmethod
    def _ours(known: dict[str, Any]) -> str | None:
        named = {entry["credential_name"]: entry["credential_id"] for entry in known["available_credentials"]}
        return named.get(CREDENTIAL_NAME)

    @staticmethod
    def _choose(settings: dict[str, Any], chosen: dict[str, Any]) -> None:
        """Puts a model into a chat app's settings; images may be sent where it sees, as many as it takes."""
        parameters = {**settings["model"].get("completion_params", {}), "max_tokens": chosen["tokens"]}
        model = {"provider": chosen["provider"], "name": chosen["name"], "completion_params": parameters}
        settings["model"] = {**settings["model"], **model}
        vision, most = chosen["images"] > 0, max(1, chosen["images"])
        image = {
            "enabled": vision,
            "number_limits": most,
            "detail": "high",
            "transfer_methods": ["remote_url", "local_file"],
        }
        settings["file_upload"] = {
            "enabled": vision,
            "allowed_file_types": ["image"],
            "allowed_file_extensions": [],
            "allowed_file_upload_methods": ["remote_url", "local_file"],
            "number_limits": most,
            "image": image,
        }

    def _changed(self, what: str, before: Any, after: Any) -> None:
        self.changes.append(what)

        def text(value: Any) -> str:
            return value if isinstance(value, str) else json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)

        self.diff.append({"header": what, "before": f"{text(before)}\n", "after": f"{text(after)}\n"})

    def _remember(self, **values: Any) -> None:
        state = {key: value for key, value in {**self.state, **values}.items() if value is not None}
        if state == self.state or self.check:
            return
        self.state = state
        self._state_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self._state_path.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as stream:
            json.dump(state, stream, indent=1, sort_keys=True)
        os.replace(temporary, self._state_path)


def _plugin(provider: str) -> str:
    """`author/plugin` of `author/plugin/provider`."""
    return "/".join(provider.split("/")[:2])


def main() -> None:
    """Entry point."""
    text = {"type": "str", "required": True}
    module = AnsibleModule(
        argument_spec={
            "url": text,
            "ca_file": {"type": "path"},
            "environment": {"type": "dict", "default": {}},
            "wait_seconds": {"type": "int", "default": 180},
            "admin": {
                "type": "dict",
                "required": True,
                "options": {"email": text, "name": text, "password": {**text, "no_log": True}, "language": text},
            },
            "plugin": {
                "type": "dict",
                "required": True,
                "options": {
                    "package": {"type": "path"},
                    "identifier": {"type": "str", "default": ""},
                    "install_seconds": {"type": "int", "default": 600},
                },
            },
            "plugins": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"package": {"type": "path"}, "identifier": {"type": "str", "default": ""}},
            },
            "provider": text,
            "model": {
                "type": "dict",
                "required": True,
                "options": {
                    "name": text,
                    "endpoint": text,
                    "api_key": {**text, "no_log": True},
                    "context_size": {"type": "int", "required": True},
                    "vision_support": text,
                    "max_images": {"type": "int", "required": True},
                    "tool_calling": text,
                    "modalities": {"type": "list", "elements": "str", "default": []},
                    "external": {"type": "bool", "default": False},
                },
            },
            "app": {"type": "dict", "required": True},
            "state_file": {"type": "path", "required": True},
            "key_file": {"type": "path", "required": True, "no_log": False},
            "summary": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    os.environ.update(hide(module))
    workspace = Workspace(module.params, check=module.check_mode)
    outcome: dict[str, Any] = {}
    try:
        workspace.run()
    except (ConsoleError, FileProblem) as error:
        outcome["msg"] = str(error)
    except OSError as error:
        outcome["msg"] = f"{error}\nRemedy: give the kit's user that path and room on its disk, then run again."
    outcome |= {"changed": bool(workspace.changes), "changes": workspace.changes, "changed_files": workspace.changes}
    if module._diff:
        outcome["diff"] = [
            {"before_header": d["header"], "after_header": d["header"], "before": d["before"], "after": d["after"]}
            for d in workspace.diff
        ]
    if "msg" in outcome:
        module.fail_json(**outcome)
    lines = summary(module.params, workspace.result) if "app_id" in workspace.result else []
    module.exit_json(**outcome, **workspace.result, kit_notice=workspace.notices, kit_summary=lines)


if __name__ == "__main__":
    main()
