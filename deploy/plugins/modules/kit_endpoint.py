"""Asks an OpenAI-compatible server what it serves, and for an answer."""

from __future__ import annotations

import os
from dataclasses import asdict

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_console import ConsoleError
from ansible.module_utils.kit_network import hide
from ansible.module_utils.kit_openai import Endpoint

DOCUMENTATION = r"""
module: kit_endpoint
short_description: Proves that an OpenAI-compatible server can be used from this host
description:
  - The server is reached, takes the key, lists the model, tells (or the site knows) its context length, and answers.
  - Never changes anything, and asks in check mode, too. The environment's proxies are used.
  - Returns C(name), C(context) in tokens, C(images) (the most with one question; 0 where the model doesn't see) and
    C(tools).
options:
  url: {type: str, required: true, description: "The server's address, as https://host/v1."}
  api_key: {type: str, required: true, description: "The server's key, may be empty."}
  model: {type: str, required: true, description: "The model's name at the server; empty: the first that it lists."}
  context_size: {type: int, default: 0, description: "In tokens, for servers that don't tell it."}
  ca_file: {type: path, description: "Root certificates for https addresses."}
  environment: {type: dict, default: {}, description: Proxies and certificates on the way out.}
author: [Dify deployment kit]
"""


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "api_key": {"type": "str", "required": True, "no_log": True},
            "model": {"type": "str", "required": True},
            "context_size": {"type": "int", "default": 0},
            "ca_file": {"type": "path"},
            "environment": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    want = module.params
    os.environ.update(hide(module))
    try:
        endpoint = Endpoint(want["url"], want["api_key"], want["ca_file"], external=True)
        model = endpoint.model(want["model"])
        if not (model.context or want["context_size"]):
            raise ConsoleError(
                f"{want['url']} does not tell how long a conversation with {model.name} may be.",
                "set provider_context_size to the model's context length in tokens.",
            )
        text, _ = endpoint.ask(model.name, "Say hello.", tokens=16)
        if not text.strip():
            raise ConsoleError(
                f"{model.name} at {want['url']} answers with nothing.", "choose another model (provider_model)."
            )
    except ConsoleError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, **asdict(model))


if __name__ == "__main__":
    main()
