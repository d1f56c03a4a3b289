"""The console client and the modules over it, against a server that answers as Dify is documented to.

Whether Dify still answers so is for the end-to-end test, which has a real one.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
from ansible.module_utils.kit_console import Answer, Console, ConsoleError, Service
from ansible.module_utils.kit_openai import Endpoint, Served, choose
from ansible.modules.kit_dify_ask import image_tokens
from ansible.modules.kit_dify_ask import summary as asked
from ansible.modules.kit_dify_console import OFFICIAL, Workspace, credentials_for, summary

PASSWORD = "correct-horse-1"
PROVIDER = "dify-kit/kit_inference/kit_inference"
IDENTIFIER = "dify-kit/kit_inference:0.1.0@" + "a" * 64
API = "/console/api"
HERE = f"{API}/workspaces/current"


class FakeDify:
    """Dify's and a model server's documented behaviour in a few dictionaries."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.ready_after = 0
        self.set_up = False
        self.logins = 0
        self.password = PASSWORD
        self.plugin: str | None = None
        self.more: list[str] = []
        self.task = {"status": "success", "plugins": [{"message": "installed"}]}
        self.install_takes = True
        self.marketplace: str | None = None
        self.served, self.images, self.tools = "smol", 0, False
        self.prompt_tokens = 20
        self.reasoning: str | None = None
        self.registered: dict[tuple[str, str], dict[str, Any]] = {}
        self.dead_model = False
        self.default: dict[str, Any] | None = None
        self.apps: dict[str, Any] = {}
        self.keys: list[dict[str, Any]] = []
        self.context = 8192
        self.answer: tuple[int, list[dict[str, Any]]] = (200, [])
        self.secure_cookies = False
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.server = server
        self.url = f"http://127.0.0.1:{server.server_port}"

    def writes(self) -> list[str]:
        """Calls that could change anything, in order."""
        reads = ("/login", "/ids", "/latest-versions", "/chat/completions")
        return [call for call in self.calls if not call.startswith("GET") and not call.endswith(reads)]

    @property
    def credentials(self) -> dict[str, Any]:
        """Of the model that is served."""
        return self.registered[PROVIDER, self.served]

    def complete(self, body: Any) -> tuple[int, Any]:
        """A model server's answer."""
        content = body["messages"][0]["content"]
        images = len(content) - 1 if isinstance(content, list) else 0
        if images > self.images:
            return 400, {"error": {"message": f"At most {self.images} image(s) may be provided in one prompt."}}
        if "tools" in body and not self.tools:
            return 400, {"error": {"message": "auto tool choice requires --enable-auto-tool-choice"}}
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": 1}
        return 200, {"choices": [{"message": {"content": "p", "reasoning": self.reasoning}}], "usage": usage}

    def respond(self, call: str, body: Any, headers: Any) -> tuple[int, Any]:
        method, path = call.split(" ")
        if path.startswith("/v1/models"):
            if headers["Authorization"] != "Bearer model-key-0123456789":
                return 401, {"error": "Unauthorized"}
            return 200, {"data": [{"id": self.served, "max_model_len": self.context}]}
        if path == "/v1/chat/completions":
            return self.complete(body)
        if path == f"{API}/setup":
            if self.ready_after > 0:
                self.ready_after -= 1
                return 502, "<html>bad gateway</html>"
            if method == "POST":
                if self.set_up:
                    return 403, {"code": "already_setup", "message": "Dify has been successfully installed."}
                assert body["password"] == PASSWORD
                self.set_up = True
                return 201, {"result": "success"}
            return 200, {"step": "finished" if self.set_up else "not_started"}
        if path == f"{API}/login":
            self.logins += 1
            if self.logins > 5:
                return 429, {"code": "email_code_login_limit", "message": "Too many incorrect password attempts."}
            if base64.b64decode(body["password"]).decode() != self.password:
                return 401, {"code": "authentication_failed", "message": "Invalid email or password."}
            return 200, {"result": "success"}
        prefix = "__Host-" if self.secure_cookies else ""
        if path.startswith(API) and (f"{prefix}access_token=a" not in (headers["Cookie"] or "")):
            return 401, {"code": "unauthorized", "message": "no cookie"}
        if path.startswith(API) and headers["X-CSRF-Token"] != "c":
            return 401, {"code": "unauthorized", "message": "CSRF token is missing or invalid."}
        return self.workspace(method, path, body)

    def workspace(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == f"{HERE}/plugin/list/installations/ids":
            there = {"i1": self.plugin, **{name: name for name in self.more}}
            plugins = [
                {"id": number, "plugin_id": name.partition(":")[0], "plugin_unique_identifier": name}
                for number, name in there.items()
                if name
            ]
            return 200, {"plugins": [plugin for plugin in plugins if plugin["plugin_id"] in body["plugin_ids"]]}
        if path == f"{HERE}/plugin/list/latest-versions":
            newest = {"unique_identifier": self.marketplace} if self.marketplace else None
            return 200, {"versions": {body["plugin_ids"][0]: newest}}
        if path == f"{HERE}/plugin/upload/pkg":
            if b"unsigned" in body:
                return 400, {"code": "plugin_error", "message": "bad signature"}
            named = re.search(rb"somebody/[\w:@.]+", body)
            return 200, {"unique_identifier": named[0].decode() if named else IDENTIFIER}
        if path == f"{HERE}/plugin/uninstall":
            if body["plugin_installation_id"] == "i1":
                self.plugin = None
            else:
                self.more.remove(body["plugin_installation_id"])
            return 200, {"success": True}
        if path in (f"{HERE}/plugin/install/pkg", f"{HERE}/plugin/install/marketplace"):
            [name] = body["plugin_unique_identifiers"]
            if self.install_takes and name.startswith("somebody/"):
                self.more.append(name)
            elif self.install_takes:
                self.plugin = name
            return 200, {"all_installed": False, "task_id": "t1"}
        if path == f"{HERE}/plugin/tasks/t1":
            return 200, {"task": self.task}
        if path.startswith(f"{HERE}/model-providers/"):
            provider = path.removeprefix(f"{HERE}/model-providers/").partition("/models")[0]
            if method == "GET":
                known = self.registered.get((provider, body["model"]))
                shown = {**known, "api_key": "model-************89"} if known else {}
                listed = [{"credential_id": "c1", "credential_name": "dify-kit"}] if known else []
                identity = {"current_credential_id": "c1" if known else None, "current_credential_name": "dify-kit"}
                return 200, {"credentials": shown, "available_credentials": listed, **identity}
            if method == "DELETE":
                del self.registered[provider, body["model"]]
                return 204, ""
            if self.dead_model:
                return 400, {"code": "invalid_param", "message": "http://x/v1 does not answer: Connection refused."}
            self.registered[provider, body["model"]] = body["credentials"]
            return 201, {"result": "success"}
        if path.startswith(f"{HERE}/models/model-types/llm"):
            offered = [
                {
                    "provider": provider,
                    "models": [
                        {
                            "model": name,
                            "status": "active",
                            "features": ["vision"] if set_to["vision_support"] == "support" else [],
                            "model_properties": {"context_size": int(set_to["context_size"])},
                        }
                    ],
                }
                for (provider, name), set_to in self.registered.items()
            ]
            return 200, {"data": offered}
        if path.startswith(f"{HERE}/default-model"):
            if method == "POST":
                setting = body["model_settings"][0]
                self.default = {"provider": {"provider": setting["provider"]}, "model": setting["model"]}
            return 200, {"data": self.default}
        if path == f"{API}/apps/imports":
            dsl = json.loads(body["yaml_content"])
            self.apps["a1"] = {"id": "a1", "name": dsl["app"]["name"], "model_config": dsl["model_config"]}
            return 200, {"status": "completed-with-warnings", "app_id": "a1"}
        if path == f"{API}/apps/a1/api-keys":
            if method == "POST":
                self.keys.append({"token": f"app-{len(self.keys)}", "created_at": len(self.keys)})
                return 201, self.keys[-1]
            return 200, {"data": self.keys}
        if path == f"{API}/apps/a1/model-config":
            self.apps["a1"]["model_config"] = body
            return 200, {"result": "success"}
        if path == f"{API}/apps":
            return 200, {"data": list(self.apps.values())}
        app = self.apps.get(path.rpartition("/")[2])
        return (200, app) if app else (404, {"code": "not_found", "message": "App not found"})

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"] or 0))
                body: Any = json.loads(raw) if "json" in (self.headers["Content-Type"] or "") else raw
                if self.command == "GET":
                    body = dict(parse_qsl(self.path.partition("?")[2]))
                call = f"{self.command} {self.path.partition('?')[0]}"
                fake.calls.append(call)
                if self.path == "/v1/chat-messages":
                    status, events = fake.answer
                    said = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
                    if status != 200 or body["response_mode"] == "blocking":
                        said = json.dumps(events[0]).encode()
                else:
                    status, value = fake.respond(call, body, self.headers)
                    said = value.encode() if isinstance(value, str) else json.dumps(value).encode()
                self.send_response(status)
                if self.path.endswith("/login") and status == 200:
                    mark = ("__Host-", "; Secure") if fake.secure_cookies else ("", "")
                    self.send_header("Set-Cookie", f"{mark[0]}access_token=a; Path=/; HttpOnly{mark[1]}")
                    self.send_header("Set-Cookie", f"{mark[0]}csrf_token=c; Path=/{mark[1]}")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST = do_PUT = do_DELETE = handle_any

            def log_message(self, format: str, *args: Any) -> None:
                """Tests are quiet."""

        return Handler


@pytest.fixture
def dify() -> Iterator[FakeDify]:
    fake = FakeDify()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def deploy(dify: FakeDify, tmp_path: Path) -> Callable[..., Workspace]:
    """One run of kit_dify_console; keyword arguments change its parameters, `check=True` only looks."""
    (tmp_path / "p.difypkg").write_bytes(b"signed")

    def run(*, check: bool = False, **changes: Any) -> Workspace:
        want: dict[str, Any] = {
            "url": dify.url,
            "ca_file": None,
            "wait_seconds": 5,
            "admin": {"email": "admin@example.com", "name": "admin", "password": PASSWORD, "language": "en-US"},
            "plugin": {"package": str(tmp_path / "p.difypkg"), "identifier": IDENTIFIER, "install_seconds": 5},
            "plugins": [],
            "provider": PROVIDER,
            "model": {
                "name": "",
                "endpoint": f"{dify.url}/v1",
                "api_key": "model-key-0123456789",
                "context_size": 0,
                "vision_support": "auto",
                "max_images": 0,
                "tool_calling": "auto",
                "modalities": [],
                "external": False,
            },
            "app": {"app": {"name": "Sample"}, "model_config": {"model": {"mode": "chat"}}},
            "state_file": str(tmp_path / "etc/provider.json"),
            "key_file": str(tmp_path / "etc/env/sample-app.env"),
        }
        for name, value in changes.items():
            want[name] = {**want[name], **value} if isinstance(value, dict) else value
        workspace = Workspace(want, check=check)
        workspace.run()
        return workspace

    return run


def test_first_run_sets_up_everything_and_the_second_writes_nothing(
    dify: FakeDify, deploy: Callable[..., Workspace], tmp_path: Path
) -> None:
    first = deploy()
    assert first.changes == ["admin", "plugin", "model smol", "default model", "sample app", "sample app's key"]
    assert (dify.credentials["context_size"], dify.credentials["vision_support"]) == ("8192", "no_support")
    assert (tmp_path / "etc/env/sample-app.env").read_text() == "DIFY_APP_KEY='app-0'\n"
    for path in ("etc/provider.json", "etc/env/sample-app.env"):
        assert (tmp_path / path).stat().st_mode & 0o777 == 0o600
    dify.calls.clear()
    second = deploy()
    assert (second.changes, dify.writes(), second.result["context"]) == ([], [], 8192)
    told = "\n".join(summary({**second.want, "summary": ["Dify: x"]}, second.result))
    assert all(part in told for part in ("Dify: x", "smol at", "8192 tokens, text only", "sample-app.env"))


def test_no_secret_in_state_or_diff(deploy: Callable[..., Workspace], tmp_path: Path) -> None:
    workspace = deploy()
    written = (tmp_path / "etc/provider.json").read_text() + json.dumps(workspace.diff) + json.dumps(workspace.result)
    for secret in (PASSWORD, "model-key-0123456789", "app-0", "model-***"):
        assert secret not in written


def test_check_mode_tells_and_writes_nothing(dify: FakeDify, deploy: Callable[..., Workspace], tmp_path: Path) -> None:
    assert deploy(check=True).changes == ["admin"]
    deploy()
    dify.calls.clear()
    assert deploy(check=True, model={"context_size": 4096}).changes == ["model smol"]
    assert dify.writes() == []
    assert deploy(check=True, url="http://127.0.0.1:9").changes == ["workspace"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"context_size": 4096}, ["model smol"]),
        ({"vision_support": "support"}, ["model smol", "sample app's model"]),
        ({"tool_calling": "support"}, ["model smol"]),
    ],
)
def test_changed_settings_are_registered_again(
    dify: FakeDify, deploy: Callable[..., Workspace], change: dict[str, Any], expected: list[str]
) -> None:
    deploy()
    dify.calls.clear()
    assert deploy(model=change).changes == expected
    assert dify.writes()[0] == f"PUT {HERE}/model-providers/{PROVIDER}/models/credentials"
    assert len(dify.writes()) == len(expected)


def test_a_server_with_another_context_is_noticed(dify: FakeDify, deploy: Callable[..., Workspace]) -> None:
    deploy()
    dify.context = 4096
    assert deploy().changes == ["model smol"]


def test_credentials_changed_in_dify_are_set_back(dify: FakeDify, deploy: Callable[..., Workspace]) -> None:
    deploy()
    dify.credentials["endpoint_url"] = "http://elsewhere/v1"
    assert deploy().changes == ["model smol"]


def test_another_plugin_content_replaces_the_installed_one(dify: FakeDify, deploy: Callable[..., Workspace]) -> None:
    deploy()
    dify.plugin = IDENTIFIER.replace("a" * 64, "b" * 64)
    dify.calls.clear()
    assert deploy().changes == ["plugin"]
    assert [call.rpartition("/")[2] for call in dify.writes()] == ["pkg", "uninstall", "pkg"]


def test_more_plugins_come_and_go_with_the_site(
    dify: FakeDify, deploy: Callable[..., Workspace], tmp_path: Path
) -> None:
    def packed(name: str) -> dict[str, str]:
        package = tmp_path / f"{name.replace('/', '-')}.difypkg"
        package.write_text(name)
        return {"package": str(package), "identifier": name}

    first, second = packed("somebody/a:1@x"), packed("somebody/b:1@x")
    assert deploy(plugins=[first, second]).changes[:4] == ["admin", "plugin", "plugin somebody/a", "plugin somebody/b"]
    dify.calls.clear()
    assert (deploy(plugins=[first, second]).changes, dify.writes()) == ([], [])
    assert deploy(plugins=[first, packed("somebody/b:2@y")], check=True).changes == ["plugin somebody/b"]
    assert dify.writes() == []
    assert deploy(plugins=[packed("somebody/b:2@y")]).changes == ["plugin somebody/b", "plugin somebody/a"]
    assert (dify.more, dify.plugin) == (["somebody/b:2@y"], IDENTIFIER)
    # What people install in Dify is theirs.
    dify.more.append("somebody/own:1@z")
    assert deploy(plugins=[]).changes == ["plugin somebody/b"]
    assert dify.more == ["somebody/own:1@z"]


def test_a_refused_package_leaves_the_installed_one(
    dify: FakeDify, deploy: Callable[..., Workspace], tmp_path: Path
) -> None:
    deploy()
    dify.plugin = "dify-kit/kit_inference:0.0.9@" + "c" * 64
    (tmp_path / "p.difypkg").write_bytes(b"unsigned")
    with pytest.raises(ConsoleError, match=r"bad signature(.|\n)*Remedy: .*doesn't know the key"):
        deploy()
    assert dify.plugin


def test_failed_installation_names_its_reason(dify: FakeDify, deploy: Callable[..., Workspace]) -> None:
    dify.install_takes = False
    dify.task = {"status": "failed", "plugins": [{"message": "failed to install dependencies: no route"}]}
    with pytest.raises(ConsoleError, match=r"no route(.|\n)*Remedy: .*kit_pypi_index"):
        deploy()
    # What the page of Dify would believe: a success that is none.
    dify.task = {"status": "success", "plugins": [{"message": ""}]}
    with pytest.raises(ConsoleError, match=r"says that .* was installed, but lists None"):
        deploy()


def test_choices_made_in_dify_stay_and_are_told(dify: FakeDify, deploy: Callable[..., Workspace]) -> None:
    deploy()
    dify.default = {"provider": {"provider": "other"}, "model": "big"}
    dify.apps["a1"]["model_config"]["model"] = {"provider": "other", "name": "big", "mode": "chat"}
    workspace = deploy()
    assert workspace.changes == []
    assert len(workspace.notices) == 2
    assert all("big, chosen" in notice for notice in workspace.notices)


def test_a_deleted_app_and_a_deleted_key_come_back(
    dify: FakeDify, deploy: Callable[..., Workspace], tmp_path: Path
) -> None:
    deploy()
    dify.keys.clear()
    assert deploy().changes == ["sample app's key"]
    dify.apps.clear()
    assert deploy().changes == ["sample app"]


def test_a_refused_login_is_never_repeated(dify: FakeDify, deploy: Callable[..., Workspace], tmp_path: Path) -> None:
    dify.set_up, dify.password = True, "changed-in-dify-2"
    with pytest.raises(ConsoleError, match=r"Invalid email or password(.|\n)*Remedy: .*kit_secret_admin_password"):
        deploy()
    for _ in range(5):
        with pytest.raises(ConsoleError, match="is not tried again"):
            deploy()
    assert dify.logins == 1
    deploy(admin={"password": "changed-in-dify-2"})
    assert "refused_login" not in json.loads((tmp_path / "etc/provider.json").read_text())


def test_a_locked_account_names_the_key_in_redis(dify: FakeDify, deploy: Callable[..., Workspace]) -> None:
    dify.set_up, dify.logins = True, 5
    with pytest.raises(ConsoleError, match=r"login_error_rate_limit:admin@example\.com"):
        deploy()


def test_a_dead_model_is_refused_with_its_reason(dify: FakeDify, deploy: Callable[..., Workspace]) -> None:
    dify.dead_model = True
    with pytest.raises(ConsoleError, match=r"Connection refused(.|\n)*Remedy: .*provider_endpoint"):
        deploy()
    with pytest.raises(ConsoleError, match=r"No model at http://127.0.0.1:9(.|\n)*Remedy: `make logs"):
        deploy(model={"endpoint": "http://127.0.0.1:9/v1"})
    with pytest.raises(ConsoleError, match=r"Remedy: start it, or .*must reach 127.0.0.1"):
        deploy(model={"endpoint": "http://127.0.0.1:9/v1", "external": True})
    with pytest.raises(ConsoleError, match=r"Remedy: set provider_api_key, in the site's secrets\.yml"):
        deploy(model={"api_key": "wrong", "external": True})


def test_waits_for_a_starting_api_but_not_for_ever(dify: FakeDify) -> None:
    dify.ready_after = 1
    assert Console(dify.url).wait(10) is False
    dify.ready_after = 100
    with pytest.raises(ConsoleError, match=r"502.*HTML page(.|\n)*make status"):
        Console(dify.url).wait(0)


def test_cookies_of_an_https_site_work_over_loopback(dify: FakeDify) -> None:
    dify.set_up = dify.secure_cookies = True
    console = Console(dify.url)
    console.login("admin@example.com", PASSWORD)
    assert console.app("none") is None


def test_model_names() -> None:
    models = [Served("smol", 8192)]
    assert choose(models, "", "x").name == choose(models, "smol", "x").name == "smol"
    with pytest.raises(ConsoleError, match="does not serve 'big' but smol"):
        choose(models, "big", "x")
    with pytest.raises(ConsoleError, match="but nothing"):
        choose([], "", "x")


@pytest.mark.parametrize(("images", "tools"), [(0, False), (4, True), (10, False)])
def test_what_a_model_can_do_is_asked_of_its_server(dify: FakeDify, images: int, tools: bool) -> None:
    dify.images, dify.tools = images, tools
    assert Endpoint(f"{dify.url}/v1", "model-key-0123456789").model("") == Served("smol", 8192, images, tools)


def test_a_model_that_sees_gets_an_app_with_images(dify: FakeDify, deploy: Callable[..., Workspace]) -> None:
    dify.images = 4
    first = deploy()
    assert (dify.credentials["vision_support"], dify.credentials["max_images"]) == ("support", "4")
    upload = dify.apps["a1"]["model_config"]["file_upload"]
    assert (upload["enabled"], upload["image"]["enabled"], upload["number_limits"]) == (True, True, 4)
    assert "sees images (4 with a question)" in "\n".join(summary({**first.want, "summary": []}, first.result))
    assert deploy().changes == []
    # The server was started anew with another limit: Dify is told, although the model is the same.
    dify.images = 2
    assert deploy().changes == ["model smol", "sample app's model"]
    assert dify.apps["a1"]["model_config"]["file_upload"]["number_limits"] == 2
    assert deploy(model={"max_images": 1}).result["images"] == 1


def test_a_model_that_should_see_and_does_not(deploy: Callable[..., Workspace]) -> None:
    with pytest.raises(ConsoleError, match=r"smol .* should see images, but its server refuses"):
        deploy(model={"modalities": ["text", "image"]})


def test_a_thinking_model_gets_room_for_its_thoughts(dify: FakeDify, deploy: Callable[..., Workspace]) -> None:
    deploy()
    assert dify.apps["a1"]["model_config"]["model"]["completion_params"]["max_tokens"] == 512
    dify.reasoning = "Hm"
    assert deploy().changes == ["sample app's model"]
    assert dify.apps["a1"]["model_config"]["model"]["completion_params"]["max_tokens"] == 4096


def test_another_model_takes_the_place_of_the_one_that_is_no_longer_served(
    dify: FakeDify, deploy: Callable[..., Workspace]
) -> None:
    deploy()
    dify.registered[PROVIDER, "by-hand"] = dify.credentials
    dify.served, dify.images = "kimi", 4
    switched = deploy()
    assert switched.changes == ["model kimi", "default model", "sample app's model", "model smol"]
    assert switched.notices == []
    assert set(dify.registered) == {(PROVIDER, "kimi"), (PROVIDER, "by-hand")}
    assert dify.default
    assert dify.default["model"] == "kimi"
    assert dify.apps["a1"]["model_config"]["file_upload"]["enabled"]
    dify.calls.clear()
    assert (deploy().changes, dify.writes()) == ([], [])


def test_apps_of_a_model_that_goes_are_named(dify: FakeDify, deploy: Callable[..., Workspace]) -> None:
    deploy()
    model = {"provider": PROVIDER, "name": "smol"}
    dify.apps["a2"] = {"id": "a2", "name": "Helpdesk", "model_config": {"model": model}}
    dify.served = "kimi"
    assert "choose another in these apps: Helpdesk." in deploy().notices[-1]


def test_the_official_plugin_takes_the_place_of_the_kits(dify: FakeDify, deploy: Callable[..., Workspace]) -> None:
    deploy()
    dify.marketplace = "langgenius/openai_api_compatible:0.0.64@" + "d" * 64
    official = {"provider": OFFICIAL, "plugin": {"package": None, "identifier": ""}}
    dify.images, dify.tools = 4, True
    # The fake holds one plugin: the kit's is gone already when it would be uninstalled.
    assert deploy(**official).changes == ["plugin", "model smol", "default model", "sample app's model", "model smol"]
    assert dify.registered[OFFICIAL, "smol"] == credentials_for(
        OFFICIAL, f"{dify.url}/v1", "model-key-0123456789", Served("smol", 8192, 4, True), 8192
    )
    assert dify.registered[OFFICIAL, "smol"]["function_calling_type"] == "tool_call"
    assert set(dify.registered) == {(OFFICIAL, "smol")}
    assert deploy(**official).changes == []


def test_a_marketplace_that_has_no_answer(deploy: Callable[..., Workspace]) -> None:
    with pytest.raises(ConsoleError, match=r"no langgenius/openai_api_compatible(.|\n)*provider_package"):
        deploy(provider=OFFICIAL, plugin={"package": None, "identifier": ""})


def test_the_pictures_tokens_are_counted(dify: FakeDify) -> None:
    model = {"name": "smol", "endpoint": f"{dify.url}/v1", "api_key": "model-key-0123456789", "external": False}
    answer = Answer("<think>Hm.</think>A circle.", "v", 1.0, 0.5, 4, 100)
    assert image_tokens("Which?", answer, model, None) == 80
    lines = asked("Which?", answer, Path("/x/shapes.png"), "a red circle", 80)
    assert lines[0] == "Asked through Dify about a picture (/x/shapes.png: a red circle): Which?"
    assert lines[1] == "Answered in 1.0 s: A circle."
    assert "100 tokens for the question, 80 of them the picture" in lines[2]
    dify.prompt_tokens = 100
    with pytest.raises(ConsoleError, match="The picture did not reach the model"):
        image_tokens("Which?", answer, model, None)


def test_answer_in_pieces(dify: FakeDify) -> None:
    end = {"event": "message_end", "metadata": {"usage": {"completion_tokens": 2}}}
    pieces = [{"event": "message", "answer": text, "conversation_id": "v"} for text in ("Par", "ís.")]
    dify.answer = (200, [{"event": "ping"}, *pieces, end])
    answer = Service(dify.url, "app-0", "kit").ask("capital?")
    assert (answer.text, answer.conversation, answer.tokens) == ("París.", "v", 2)


def test_answer_in_one_piece(dify: FakeDify) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 2}
    said = {"event": "message", "answer": "París.", "conversation_id": "v", "metadata": {"usage": usage}}
    dify.answer = (200, [said])
    answer = Service(dify.url, "app-0", "kit").ask("capital?", stream=False)
    assert (answer.text, answer.conversation, answer.tokens, answer.prompt_tokens) == ("París.", "v", 2, 9)


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (200, {"event": "error", "status": 400, "code": "completion_request_error", "message": "refused"}, "refused"),
        (200, {"event": "message_end"}, "with nothing"),
        (401, {"code": "unauthorized", "message": "Access token is invalid"}, "makes a new one"),
        (400, {"code": "provider_not_initialize", "message": "No valid model"}, "registers it"),
    ],
)
def test_a_question_that_gets_no_answer(dify: FakeDify, status: int, said: dict[str, Any], expected: str) -> None:
    dify.answer = (status, [said])
    with pytest.raises(ConsoleError, match=expected):
        Service(dify.url, "app-0", "kit").ask("capital?")
