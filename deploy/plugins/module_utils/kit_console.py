"""Dify's console and service API, as far as a deployment needs them. Standard library only: it runs on the hosts.

A login is tried once and never again: after five wrong ones Dify locks the account for a day.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import secrets
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

# Seconds until a request is given up. Console calls may wait for the plugin daemon, answers for the model.
CALL_SECONDS = 60.0
ANSWER_SECONDS = 600.0
CONSOLE = "/console/api"
WORKSPACE = f"{CONSOLE}/workspaces/current"


class ConsoleError(Exception):
    """What Dify refused and why, with a remedy; `status` is HTTP's (0: no answer), `code` Dify's own."""

    def __init__(self, what: str, remedy: str, status: int = 0, code: str = "") -> None:
        super().__init__(f"{what}\nRemedy: {remedy}")
        self.what = what
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Answer:
    """A model's answer through Dify; times in seconds since the question, `first` until the first piece arrived.

    `tokens` of the answer and `prompt_tokens` of the question are the model server's counts; None where it gave none.
    """

    text: str
    conversation: str
    seconds: float
    first: float
    tokens: int | None
    prompt_tokens: int | None = None


class Http:
    """Requests to one server, without proxies unless they are given: a console is reached directly."""

    def __init__(self, url: str, ca_file: str | None = None, proxies: Mapping[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler(dict(proxies or {}))]
        if self.url.startswith("https:"):
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca_file)))
        self._opener = urllib.request.build_opener(*handlers)

    def open(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = CALL_SECONDS,
    ) -> Any:
        """The open response. Raises ConsoleError for every status from 400 on and where nobody answers."""
        request = urllib.request.Request(f"{self.url}{path}", data=body, headers=dict(headers or {}), method=method)
        try:
            return self._opener.open(request, timeout=seconds)
        except urllib.error.HTTPError as error:
            raise refusal(method, f"{self.url}{path}", error.code, error.read()) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ConsoleError(
                f"{self.url} does not answer to {method} {path.partition('?')[0]}: {reason}.",
                "`make status` shows what runs, `make logs SERVICE=api` why not; then run `make deploy` again.",
            ) from None


def refusal(method: str, url: str, status: int, body: bytes) -> ConsoleError:
    """An error response as an exception, with the words of whoever sent it."""
    text = body.decode(errors="replace")
    code, reason = "", text.strip()[:1000]
    try:
        said = json.loads(text)
        code = str(said.get("code") or "")
        reason = str(said.get("message") or said.get("error") or said.get("detail") or reason)
    except (ValueError, AttributeError):
        if text.lstrip().startswith("<"):
            reason = "an HTML page; something else than Dify's API answers there"
    remedy = "read `make logs SERVICE=api`; it has the cause with the same time."
    if status in (502, 503, 504):
        remedy = "the API is starting or down: `make status`, then `make logs SERVICE=api`."
    return ConsoleError(f"{method} {url.partition('?')[0]} failed ({status}): {reason}", remedy, status, code)


def multipart(fields: Mapping[str, str], files: Mapping[str, Path]) -> tuple[bytes, str]:
    """A form with files, and its content type. A file's own type is guessed from its name."""
    boundary = f"kit-{secrets.token_hex(16)}"
    parts = []
    for name, value in fields.items():
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for name, path in files.items():
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        head = f'Content-Disposition: form-data; name="{name}"; filename="{path.name}"\r\nContent-Type: {kind}'
        parts += [f"--{boundary}\r\n{head}\r\n\r\n".encode(), path.read_bytes(), b"\r\n"]
    parts.append(f"--{boundary}--\r\n".encode())
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"


class Console:
    """The console API, logged in or not.

    >>> console = Console("http://127.0.0.1:17800")
    >>> console.login("admin@example.com", password)
    >>> console.get("/apps", name="Sample")
    """

    def __init__(self, url: str, ca_file: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._http = Http(url, ca_file)
        self._cookies: dict[str, str] = {}

    # --- requests -----------------------------------------------------------------------------------------------------
    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        files: Mapping[str, Path] | None = None,
        seconds: float = CALL_SECONDS,
    ) -> Any:
        """The parsed answer to one call, None for an empty one. Raises ConsoleError."""
        headers = {"Accept": "application/json"}
        data = None
        if files:
            data, headers["Content-Type"] = multipart(body or {}, files)
        elif body is not None:
            data, headers["Content-Type"] = json.dumps(body, ensure_ascii=False).encode(), "application/json"
        if self._cookies:
            # By hand: behind an https address the cookies are marked Secure, and a cookie jar would not send them to
            # the loopback address that the host itself uses.
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self._cookies.items())
            headers["X-CSRF-Token"] = self._cookie("csrf_token")
        with self._http.open(method, path, data, headers, seconds) as response:
            for line in response.headers.get_all("Set-Cookie") or []:
                self._cookies.update({name: morsel.value for name, morsel in SimpleCookie(line).items()})
            text = response.read()
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            raise ConsoleError(
                f"{self.url}{path.partition('?')[0]} answers, but not as Dify's API does: {text[:80]!r}",
                "provider_console_url must be the address of Dify's gateway.",
            ) from None

    def get(self, path: str, **query: Any) -> Any:
        """GET below the console API."""
        return self.request("GET", f"{CONSOLE}{path}" + (f"?{urlencode(query)}" if query else ""))

    def _cookie(self, name: str) -> str:
        return next((value for key, value in self._cookies.items() if key.removeprefix("__Host-") == name), "")

    # --- the account --------------------------------------------------------------------------------------------------
    def wait(self, seconds: float) -> bool:
        """Waits until the API answers; says whether Dify has been set up. Raises ConsoleError after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            try:
                return bool(self.get("/setup")["step"] == "finished")
            except ConsoleError as error:
                if error.status not in (0, 502, 503, 504) or time.monotonic() >= end:
                    raise
            time.sleep(1)

    def setup(self, email: str, name: str, password: str, language: str) -> None:
        """Makes the first admin. Possible once."""
        body = {"email": email, "name": name, "password": password, "language": language}
        self.request("POST", f"{CONSOLE}/setup", body)

    def login(self, email: str, password: str) -> None:
        """Logs in, once. Raises ConsoleError with the ways out where Dify refuses."""
        encoded = base64.b64encode(password.encode()).decode()
        try:
            said = self.request("POST", f"{CONSOLE}/login", {"email": email, "password": encoded, "remember_me": False})
        except ConsoleError as error:
            if error.status == 429:
                raise ConsoleError(
                    f"Dify has locked {email} after five wrong passwords.",
                    "wait a day, or delete the key `login_error_rate_limit:"
                    f"{email.lower()}` in Redis, database 0; before that, set the right password, see below.\n"
                    f"{_credentials_remedy(email)}",
                    429,
                    error.code,
                ) from None
            if error.status in (400, 401, 403):
                raise ConsoleError(
                    f"Dify refuses the login of {email}: {error.what.partition('): ')[2] or error.what}",
                    _credentials_remedy(email),
                    error.status,
                    error.code,
                ) from None
            raise
        if not self._cookie("csrf_token"):
            reason = said.get("data") if isinstance(said, dict) else said
            raise ConsoleError(f"Dify does not let {email} in: {reason}", _credentials_remedy(email), 403)

    # --- plugins ------------------------------------------------------------------------------------------------------
    def installed_plugin(self, plugin_id: str) -> dict[str, Any] | None:
        """What is really installed under `author/name`: `id`, `plugin_unique_identifier`, `version` and more."""
        return self.installed_plugins([plugin_id]).get(plugin_id)

    def installed_plugins(self, plugin_ids: list[str]) -> dict[str, dict[str, Any]]:
        """The same for several; those that are not installed are missing."""
        said = self.request("POST", f"{WORKSPACE}/plugin/list/installations/ids", {"plugin_ids": plugin_ids})
        return {item["plugin_id"]: item for item in said["plugins"] if item["plugin_id"] in plugin_ids}

    def upload_plugin(self, package: Path) -> str:
        """Uploads a package; the daemon checks its signature. Returns its unique identifier."""
        try:
            said = self.request("POST", f"{WORKSPACE}/plugin/upload/pkg", files={"pkg": package}, seconds=300)
        except ConsoleError as error:
            if "signature" in error.what:
                raise ConsoleError(
                    error.what,
                    "the plugin daemon doesn't know the key that signed the package. `make restart "
                    "SERVICE=plugin-daemon`, then `make deploy`; it must run with the site's public key.",
                    error.status,
                    error.code,
                ) from None
            raise
        return str(said["unique_identifier"])

    def uninstall_plugin(self, installation_id: str) -> None:
        """Uninstalls; the credentials of customized models and whatever uses them stay."""
        self.request("POST", f"{WORKSPACE}/plugin/uninstall", {"plugin_installation_id": installation_id}, seconds=300)

    def install_plugin(self, identifier: str, seconds: float, source: str = "pkg") -> None:
        """Installs an uploaded plugin (or one of the `marketplace`) with its Python packages, and waits for it."""
        wanted = {"plugin_unique_identifiers": [identifier]}
        started = self.request("POST", f"{WORKSPACE}/plugin/install/{source}", wanted, seconds=300)
        end = time.monotonic() + seconds
        plugin_id, message = identifier.partition(":")[0], ""
        while not started.get("all_installed"):
            try:
                task = self.get(f"/workspaces/current/plugin/tasks/{started['task_id']}")["task"]
            except ConsoleError as error:
                # A finished task disappears after a while: what counts is what is installed.
                if error.status == 0 or self.installed_plugin(plugin_id) is None:
                    raise
                break
            message = "; ".join(str(plugin.get("message") or "") for plugin in task["plugins"])
            if task["status"] == "failed":
                raise ConsoleError(
                    f"The plugin {identifier} was not installed: {message}",
                    "it installs Python packages: is the index reachable (kit_pypi_index, kit_https_proxy)? For a host "
                    "without one, `make plugin-package` puts them into the package. "
                    "`make logs SERVICE=plugin-daemon` has the whole story.",
                )
            if task["status"] == "success":
                break
            if time.monotonic() >= end:
                raise ConsoleError(
                    f"The plugin {identifier} was not installed within {seconds:.0f} s; last word: {message!r}.",
                    "read `make logs SERVICE=plugin-daemon`; on a slow network raise provider_install_seconds.",
                )
            time.sleep(1)
        found = self.installed_plugin(plugin_id)
        if found is None or found["plugin_unique_identifier"] != identifier:
            raise ConsoleError(
                f"Dify says that {identifier} was installed, but lists {found and found['plugin_unique_identifier']}.",
                "read `make logs SERVICE=plugin-daemon`, then run `make deploy` again.",
            )

    def install_from_marketplace(self, plugin_id: str, seconds: float) -> None:
        """Installs the newest version that Dify's marketplace has. Raises ConsoleError where it cannot be had."""
        remedy = (
            "the API's host must reach marketplace.dify.ai (kit_https_proxy), and dify_source_marketplace must be "
            "true. Or give the package as a file: provider_package."
        )
        said = self.request("POST", f"{WORKSPACE}/plugin/list/latest-versions", {"plugin_ids": [plugin_id]})
        newest = (said["versions"].get(plugin_id) or {}).get("unique_identifier")
        if not newest:
            raise ConsoleError(f"Dify finds no {plugin_id} in its marketplace.", remedy)
        try:
            self.install_plugin(str(newest), seconds, "marketplace")
        except ConsoleError as error:
            raise ConsoleError(f"{newest} from the marketplace: {error.what}", remedy, error.status) from None

    # --- models -------------------------------------------------------------------------------------------------------
    def model_credential(self, provider: str, model: str, credential_id: str | None = None) -> dict[str, Any]:
        """The credential in use for a customized model (or the one named), secrets hidden, and all there are."""
        query = {"model": model, "model_type": "llm", "config_from": "custom-model"}
        if credential_id:
            query["credential_id"] = credential_id
        said: dict[str, Any] = self.get(f"/workspaces/current/model-providers/{provider}/models/credentials", **query)
        return said

    def save_model_credential(
        self, provider: str, model: str, name: str, credentials: Mapping[str, str], credential_id: str | None
    ) -> None:
        """Makes a credential or replaces the one with this id. Dify asks the model for an answer before it saves."""
        body: dict[str, Any] = {"model": model, "model_type": "llm", "name": name, "credentials": dict(credentials)}
        if credential_id:
            body["credential_id"] = credential_id
        path = f"{WORKSPACE}/model-providers/{provider}/models/credentials"
        try:
            self.request("PUT" if credential_id else "POST", path, body, seconds=ANSWER_SECONDS)
        except ConsoleError as error:
            if error.status != 400:
                raise
            raise ConsoleError(
                f"Dify asked the model {model!r} for an answer and got none: {error.what.partition('): ')[2]}",
                "`make logs SERVICE=inference` for the kit's own model service; for another one correct "
                "provider_endpoint, provider_api_key and provider_model.",
                400,
                error.code,
            ) from None

    def use_model_credential(self, provider: str, model: str, credential_id: str) -> None:
        """Makes a credential the one in use, and the model part of the workspace."""
        body = {"model": model, "model_type": "llm", "credential_id": credential_id}
        self.request("POST", f"{WORKSPACE}/model-providers/{provider}/models/credentials/switch", body)

    def remove_model(self, provider: str, model: str) -> None:
        """Takes a customized model out of the workspace, with all its credentials."""
        body = {"model": model, "model_type": "llm"}
        self.request("DELETE", f"{WORKSPACE}/model-providers/{provider}/models", body)

    def models(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The language models that Dify offers by (provider, name): `status`, `features`, `model_properties`, ..."""
        said = self.get("/workspaces/current/models/model-types/llm")["data"]
        return {(entry["provider"], model["model"]): model for entry in said for model in entry["models"]}

    def default_model(self) -> tuple[str, str] | None:
        """Provider and name of the workspace's default language model."""
        try:
            said = self.get("/workspaces/current/default-model", model_type="llm")["data"]
        except ConsoleError as error:
            if error.status in (400, 500):  # its provider is gone
                return None
            raise
        return (said["provider"]["provider"], said["model"]) if said else None

    def set_default_model(self, provider: str, model: str) -> None:
        """Sets the workspace's default language model."""
        setting = {"model_type": "llm", "provider": provider, "model": model}
        self.request("POST", f"{WORKSPACE}/default-model", {"model_settings": [setting]})

    # --- apps ---------------------------------------------------------------------------------------------------------
    def app(self, app_id: str) -> dict[str, Any] | None:
        """An app with its settings, or None."""
        try:
            said: dict[str, Any] = self.get(f"/apps/{quote(app_id)}")
        except ConsoleError as error:
            if error.status == 404:
                return None
            raise
        return said

    def app_named(self, name: str) -> str | None:
        """The id of the app of exactly this name."""
        found = self.get("/apps", name=name, page=1, limit=100)["data"]
        return next((str(app["id"]) for app in found if app["name"] == name), None)

    def apps_with(self, provider: str, model: str) -> list[str]:
        """Names of the chat, agent and completion apps that use a model; a workflow's nodes are not looked at."""
        found = self.get("/apps", page=1, limit=100)["data"]
        used = {"provider": provider, "name": model}
        return [
            str(app["name"])
            for app in found
            if used.items() <= (((app.get("model_config") or {}).get("model")) or {}).items()
        ]

    def import_app(self, dsl: Mapping[str, Any]) -> str:
        """Makes an app of a description; returns its id."""
        # JSON is YAML, and needs no library on the host.
        body = {"mode": "yaml-content", "yaml_content": json.dumps(dsl, ensure_ascii=False)}
        said = self.request("POST", f"{CONSOLE}/apps/imports", body)
        if said["status"] == "pending":  # of another major version of the format
            said = self.request("POST", f"{CONSOLE}/apps/imports/{said['id']}/confirm", {})
        if not said.get("app_id"):
            raise ConsoleError(
                f"Dify did not import the app: {said.get('error')}", "report it with the release that you deploy."
            )
        return str(said["app_id"])

    def configure_app(self, app_id: str, settings: Mapping[str, Any]) -> None:
        """Replaces a chat app's settings."""
        self.request("POST", f"{CONSOLE}/apps/{quote(app_id)}/model-config", dict(settings))

    def app_keys(self, app_id: str) -> list[str]:
        """The app's keys for the service API, oldest first."""
        keys = self.get(f"/apps/{quote(app_id)}/api-keys")["data"]
        return [str(key["token"]) for key in sorted(keys, key=lambda key: key.get("created_at") or 0)]

    def make_app_key(self, app_id: str) -> str:
        """A new key of an app; Dify allows ten."""
        return str(self.request("POST", f"{CONSOLE}/apps/{quote(app_id)}/api-keys")["token"])


def _credentials_remedy(email: str) -> str:
    return (
        "if the admin's password or address was changed in Dify, tell the kit: kit_secret_admin_password in the "
        f"site's secrets.yml, dify_admin_email (now {email}) in its settings.yml. A refused password is sent "
        "only once, because Dify locks an account after five."
    )


class Service:
    """The service API of one app: what programs that use it call."""

    def __init__(self, url: str, key: str, user: str, ca_file: str | None = None) -> None:
        self._http = Http(url, ca_file)
        self._headers = {"Authorization": f"Bearer {key}", "Accept": "application/json"}
        self.user = user

    def ask(
        self, question: str, *, image: Path | None = None, stream: bool = True, seconds: float = ANSWER_SECONDS
    ) -> Answer:
        """One question in a conversation of its own. Raises ConsoleError, also for an answer without any text."""
        started = time.monotonic()
        body: dict[str, Any] = {
            "inputs": {},
            "query": question,
            "response_mode": "streaming" if stream else "blocking",
            "user": self.user,
            "auto_generate_name": False,  # spares the model a second question
        }
        if image:
            file = {"type": "image", "transfer_method": "local_file", "upload_file_id": self.upload(image)}
            body["files"] = [file]
        headers = {**self._headers, "Content-Type": "application/json"}
        data = json.dumps(body, ensure_ascii=False).encode()
        text, conversation, first = "", "", 0.0
        usage: dict[str, Any] = {}
        try:
            with self._http.open("POST", "/v1/chat-messages", data, headers, seconds) as response:
                for event in _events(response) if stream else [{**json.load(response), "event": "message_end"}]:
                    kind = event.get("event")
                    if kind == "error":
                        status = int(event.get("status") or 500)
                        raise refusal("POST", f"{self._http.url}/v1/chat-messages", status, _json(event))
                    conversation = event.get("conversation_id") or conversation
                    if kind in ("message", "agent_message") or not stream:
                        first = first or time.monotonic() - started
                        text += event.get("answer") or ""
                    if kind == "message_end":
                        usage = (event.get("metadata") or {}).get("usage") or {}
        except ConsoleError as error:
            raise _explained(error) from None
        except OSError as error:
            raise ConsoleError(
                f"The answer to {question!r} broke off after {time.monotonic() - started:.0f} s: {error}.",
                "`make logs SERVICE=inference` and `make logs SERVICE=plugin-daemon` say who stopped.",
            ) from None
        if not text.strip():
            raise ConsoleError(
                f"Dify answered {question!r} with nothing.", "read `make logs SERVICE=inference`; try another model."
            )
        seconds = time.monotonic() - started
        return Answer(text, conversation, seconds, first, usage.get("completion_tokens"), usage.get("prompt_tokens"))

    def upload(self, file: Path) -> str:
        """Uploads a file for this user; returns its id."""
        data, kind = multipart({"user": self.user}, {"file": file})
        with self._http.open("POST", "/v1/files/upload", data, {**self._headers, "Content-Type": kind}) as response:
            return str(json.load(response)["id"])

    def forget(self, conversation: str) -> None:
        """Deletes a conversation."""
        headers = {**self._headers, "Content-Type": "application/json"}
        path = f"/v1/conversations/{quote(conversation)}"
        self._http.open("DELETE", path, _json({"user": self.user}), headers).close()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """The server-sent events of a response."""
    for line in response:
        if line.startswith(b"data:"):
            try:
                yield json.loads(line[5:])
            except ValueError:
                continue


def _explained(error: ConsoleError) -> ConsoleError:
    """A refused question with what to do about it."""
    remedies = {
        "unauthorized": "the app's key was deleted in Dify: `make deploy` makes a new one.",
        "provider_not_initialize": "the app's model has no credentials: `make deploy` registers it.",
        "app_unavailable": "the app has no model: open it in Dify, or delete it and run `make deploy`.",
    }
    remedy = remedies.get(error.code)
    if error.status == 400 and not remedy:
        remedy = "`make logs SERVICE=inference` shows the model's side; `make deploy` registers the model anew."
    return ConsoleError(error.what, remedy, error.status, error.code) if remedy else error
