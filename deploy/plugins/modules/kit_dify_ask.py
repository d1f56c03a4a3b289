"""Asks a Dify app a question through its service API, as a program of the site's users would."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_console import Answer, ConsoleError, Service

DOCUMENTATION = r"""
module: kit_dify_ask
short_description: Asks a Dify app a question
description:
  - Never changes anything; the conversation is deleted afterwards.
  - Returns C(answer), C(seconds), C(first) (seconds until its first piece), C(tokens), and the question with its answer
    as lines of the summary.
options:
  url: {type: str, required: true, description: "Where this host reaches Dify."}
  ca_file: {type: path, description: "Root certificates for https addresses."}
  key_file: {type: path, required: true, description: "Env file with DIFY_APP_KEY."}
  question: {type: str, required: true, description: "The question."}
  image: {type: path, description: "A picture to ask about, on the host."}
  stream: {type: bool, default: true, description: "Whether the answer comes in pieces."}
  user: {type: str, default: kit, description: "Whom Dify shall note as asking."}
  seconds: {type: int, default: 600, description: "How long the answer may take."}
author: [Dify deployment kit]
"""


def app_key(path: Path) -> str:
    """The key that kit_dify_console left."""
    try:
        lines = path.read_text().splitlines()
        return next(line.partition("=")[2].strip("'\"") for line in lines if line.startswith("DIFY_APP_KEY="))
    except (OSError, StopIteration):
        raise ConsoleError(f"{path} holds no DIFY_APP_KEY.", "`make deploy` makes the app and its key.") from None


def summary(question: str, answer: Answer) -> list[str]:
    """Question and answer for people; a long answer is cut."""
    text = textwrap.shorten(" ".join(answer.text.split()), 300, placeholder=" ...")
    return [f"Asked through Dify: {question}", f"Answered in {answer.seconds:.1f} s: {text}"]


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "ca_file": {"type": "path"},
            "key_file": {"type": "path", "required": True, "no_log": False},
            "question": {"type": "str", "required": True},
            "image": {"type": "path"},
            "stream": {"type": "bool", "default": True},
            "user": {"type": "str", "default": "kit"},
            "seconds": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    want = module.params
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, msg="a check asks no questions")
    try:
        service = Service(want["url"], app_key(Path(want["key_file"])), want["user"], want["ca_file"])
        image = Path(want["image"]) if want["image"] else None
        answer = service.ask(want["question"], image=image, stream=want["stream"], seconds=want["seconds"])
        service.forget(answer.conversation)
    except (ConsoleError, OSError, json.JSONDecodeError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=False,
        answer=answer.text,
        seconds=round(answer.seconds, 2),
        first=round(answer.first, 2),
        tokens=answer.tokens,
        kit_summary=summary(want["question"], answer),
    )


if __name__ == "__main__":
    main()
