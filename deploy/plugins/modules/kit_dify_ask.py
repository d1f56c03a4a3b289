"""Asks a Dify app a question through its service API, as a program of the site's users would."""

from __future__ import annotations

import json
import os
import re
import textwrap
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_console import Answer, ConsoleError, Service
from ansible.module_utils.kit_network import hide
from ansible.module_utils.kit_openai import Endpoint

DOCUMENTATION = r"""
module: kit_dify_ask
short_description: Asks a Dify app a question
description:
  - Never changes anything; the conversation is deleted afterwards.
  - With C(image), and C(model) to count with, proves that the picture reached the model. The engine counts the
    question's tokens; asked without the picture it counts fewer, and the picture's are the difference.
  - Returns C(answer), C(seconds), C(first) (seconds until its first piece), C(tokens), C(prompt_tokens),
    C(image_tokens) (0 without a picture), and the question with its answer as lines of the summary.
options:
  url: {type: str, required: true, description: "Where this host reaches Dify."}
  ca_file: {type: path, description: "Root certificates for https addresses."}
  environment: {type: dict, default: {}, description: Proxies and certificates on the way out.}
  key_file: {type: path, required: true, description: "Env file with DIFY_APP_KEY."}
  question: {type: str, required: true, description: "The question."}
  image: {type: path, description: "A PNG to ask about, on the host."}
  image_shows: {type: str, default: "", description: "What is on it, for whoever reads the answer."}
  model:
    type: dict
    description: "The app's model, asked directly how many tokens the question has without the picture."
    options:
      name: {type: str, required: true, description: "Its name at the server."}
      endpoint: {type: str, required: true, description: "The server's address, as http://host:8000/v1."}
      api_key: {type: str, required: true, description: "The server's key, may be empty."}
      external: {type: bool, default: false, description: "Whether somebody else runs it: through the proxies."}
  stream: {type: bool, default: true, description: "Whether the answer comes in pieces."}
  user: {type: str, default: kit, description: "Whom Dify shall note as asking."}
  seconds: {type: int, default: 600, description: "How long the answer may take."}
author: [Dify deployment kit]
"""

# What a model thought before it answered is not what people asked for.
THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


def app_key(path: Path) -> str:
    """The key that kit_dify_console left."""
    try:
        lines = path.read_text().splitlines()
        return next(line.partition("=")[2].strip("'\"") for line in lines if line.startswith("DIFY_APP_KEY="))
    except (OSError, StopIteration):
        raise ConsoleError(f"{path} holds no DIFY_APP_KEY.", "`make deploy` makes the app and its key.") from None


def image_tokens(question: str, answer: Answer, model: dict[str, Any], ca_file: str | None) -> int:
    """How many of the question's tokens are the picture's. Raises ConsoleError where there are none."""
    endpoint = Endpoint(model["endpoint"], model["api_key"], ca_file, external=model["external"])
    _, without = endpoint.ask(model["name"], question)
    counted = answer.prompt_tokens or 0
    if without and counted <= without:
        raise ConsoleError(
            f"The picture did not reach the model: its server counted {counted} tokens for the question with it and "
            f"{without} without.",
            "is image upload on in the sample app? `make logs SERVICE=plugin-daemon` shows what became of it.",
        )
    return counted - without if without else 0


def summary(question: str, answer: Answer, image: Path | None, shows: str, tokens: int) -> list[str]:
    """Question and answer for people; a long answer is cut, and what was thought before it left out."""
    said = " ".join(THOUGHTS.sub("", answer.text).split()) or "(only thoughts, no answer)"
    text = textwrap.shorten(said, 300, placeholder=" ...") if " " in said else said[:300]
    picture = f" about a picture ({image}{': ' if shows else ''}{shows})" if image else ""
    lines = [f"Asked through Dify{picture}: {question}", f"Answered in {answer.seconds:.1f} s: {text}"]
    if tokens:
        lines.append(f"The engine counted {answer.prompt_tokens} tokens for the question, {tokens} of them the picture")
    return lines


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "ca_file": {"type": "path"},
            "environment": {"type": "dict", "default": {}},
            "key_file": {"type": "path", "required": True, "no_log": False},
            "question": {"type": "str", "required": True},
            "image": {"type": "path"},
            "image_shows": {"type": "str", "default": ""},
            "model": {
                "type": "dict",
                "options": {
                    "name": {"type": "str", "required": True},
                    "endpoint": {"type": "str", "required": True},
                    "api_key": {"type": "str", "required": True, "no_log": True},
                    "external": {"type": "bool", "default": False},
                },
            },
            "stream": {"type": "bool", "default": True},
            "user": {"type": "str", "default": "kit"},
            "seconds": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    want = module.params
    os.environ.update(hide(module))
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, msg="a check asks no questions")
    try:
        service = Service(want["url"], app_key(Path(want["key_file"])), want["user"], want["ca_file"])
        image = Path(want["image"]) if want["image"] else None
        answer = service.ask(want["question"], image=image, stream=want["stream"], seconds=want["seconds"])
        service.forget(answer.conversation)
        counted = (
            image_tokens(want["question"], answer, want["model"], want["ca_file"]) if image and want["model"] else 0
        )
    except (ConsoleError, OSError, json.JSONDecodeError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=False,
        answer=answer.text,
        seconds=round(answer.seconds, 2),
        first=round(answer.first, 2),
        tokens=answer.tokens,
        prompt_tokens=answer.prompt_tokens,
        image_tokens=counted,
        kit_summary=summary(want["question"], answer, image, want["image_shows"], counted),
    )


if __name__ == "__main__":
    main()
