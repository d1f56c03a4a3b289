"""How vLLM's benchmark asks an app of Dify instead of a model: one more of its request functions.

Imported where vLLM is installed only.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS, RequestFuncInput, RequestFuncOutput

USER = "kit-bench"


async def ask(request_func_input: RequestFuncInput, session: Any, pbar: Any = None) -> RequestFuncOutput:
    """One streamed answer through Dify's service API, with the app's key from OPENAI_API_KEY.

    An app decides itself how long an answer may be: after the tokens that the benchmark asks for, Dify is told to
    stop. What Dify keeps of the conversation is deleted once the time is taken.
    """
    asked = request_func_input  # vLLM names it
    output = RequestFuncOutput(prompt_len=asked.prompt_len)
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    body = {"inputs": {}, "query": asked.prompt, "response_mode": "streaming", "user": USER}
    conversation = ""
    begun = last = output.start_time = time.perf_counter()
    try:
        async with session.post(asked.api_url, json=body, headers=headers) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                conversation = event.get("conversation_id") or conversation
                if event["event"] == "error":
                    raise RuntimeError(event.get("message"))
                if event["event"] not in ("message", "agent_message") or output.output_tokens >= asked.output_len:
                    continue
                now = time.perf_counter()
                if output.output_tokens:
                    output.itl.append(now - last)
                else:
                    output.ttft = now - begun
                last = now
                output.output_tokens += 1
                output.generated_text += event["answer"]
                if output.output_tokens == asked.output_len:
                    stop = f"{asked.api_url}/{event['task_id']}/stop"
                    async with session.post(stop, json={"user": USER}, headers=headers):
                        pass
        output.latency = last - begun
        output.success = output.output_tokens > 0
    except Exception as error:  # the benchmark counts it and goes on
        output.error = repr(error)
    if conversation:
        url = f"{asked.api_url.removesuffix('/chat-messages')}/conversations/{conversation}"
        async with session.delete(url, json={"user": USER}, headers=headers):
            pass
    if pbar:
        pbar.update(1)
    return output


ASYNC_REQUEST_FUNCS["dify"] = ask
