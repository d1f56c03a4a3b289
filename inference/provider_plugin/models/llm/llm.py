"""Language and vision-language models of an OpenAI-compatible server."""

from collections.abc import Generator, Mapping
from typing import Any

import dify_plugin
import requests
from dify_plugin.entities.model import AIModelEntity, DefaultParameterName
from dify_plugin.entities.model.llm import LLMResult, LLMResultChunk
from dify_plugin.entities.model.message import PromptMessage, PromptMessageTool
from dify_plugin.errors.model import CredentialsValidateFailedError, InvokeServerUnavailableError
from models.server import Facts, Server, ServerProblem
from models.thinking import ThinkingMarks


# Named by its module: the SDK takes every model class among this file's names for one of the plugin's.
class KitLargeLanguageModel(dify_plugin.OAICompatLargeLanguageModel):
    """The SDK's OpenAI-compatible model, with its settings read from the server instead of asked from people."""

    def validate_credentials(self, model: str, credentials: Mapping[str, Any]) -> None:
        """Asks the server for a real answer. Raises CredentialsValidateFailedError with the reason."""
        try:
            server = self._server(credentials)
            complete = self._complete(credentials, server, server.facts(model, anew=True))
        except ServerProblem as problem:
            raise CredentialsValidateFailedError(str(problem)) from problem
        super().validate_credentials(model, complete)

    def get_customizable_model_schema(self, model: str, credentials: Mapping[str, Any]) -> AIModelEntity:
        """What Dify shows and offers for `model`."""
        complete = self._known(model, credentials)
        schema: AIModelEntity = super().get_customizable_model_schema(model, complete)
        for rule in schema.parameter_rules:
            if rule.name == DefaultParameterName.MAX_TOKENS.value:
                # An answer of the whole context is never wanted by default; the base class's 512 cuts reasoning off.
                rule.default = min(2048, max(1, int(complete["context_size"]) // 4))
        return schema

    def _invoke(
        self,
        model: str,
        credentials: dict[str, Any],
        prompt_messages: list[PromptMessage],
        model_parameters: dict[str, Any],
        tools: list[PromptMessageTool] | None = None,
        stop: list[str] | None = None,
        stream: bool = True,
        user: str | None = None,
    ) -> LLMResult | Generator[LLMResultChunk, None, None]:
        """Asks the model; a stream comes with the server's own token counts at its end."""
        complete = self._known(model, credentials)
        parameters = {**model_parameters, **({"stream_options": {"include_usage": True}} if stream else {})}
        answer = super()._invoke(model, complete, prompt_messages, parameters, tools, stop, stream, user)
        return self._with_known_marks(answer) if stream else answer

    def _handle_generate_response(
        self,
        model: str,
        credentials: dict[str, Any],
        response: requests.Response,
        prompt_messages: list[PromptMessage],
    ) -> LLMResult:
        """As the base class, but with the reasoning, which it drops from answers that aren't streamed."""
        result: LLMResult = super()._handle_generate_response(model, credentials, response, prompt_messages)
        message = response.json()["choices"][0].get("message", {})
        marks = ThinkingMarks()
        text = marks.feed(message.get("content") or "") + marks.flush()
        reasoning = message.get("reasoning") or message.get("reasoning_content")
        result.message.content = f"<think>\n{reasoning}\n</think>{text}" if reasoning else text
        return result

    def _get_num_tokens_by_gpt2(self, text: str) -> int:
        """An estimate: the SDK's tokenizer fetches its vocabulary from the internet at first use."""
        return len(text.encode()) // 4 + 1

    @staticmethod
    def _with_known_marks(chunks: Generator[LLMResultChunk, None, None]) -> Generator[LLMResultChunk, None, None]:
        marks = ThinkingMarks()
        for chunk in chunks:
            message = chunk.delta.message
            if isinstance(message.content, str):
                message.content = marks.feed(message.content)
                if chunk.delta.usage is not None:  # the last one
                    message.content += marks.flush()
            yield chunk

    @staticmethod
    def _server(credentials: Mapping[str, Any]) -> Server:
        return Server(str(credentials.get("endpoint_url") or ""), str(credentials.get("api_key") or ""))

    def _known(self, model: str, credentials: Mapping[str, Any]) -> dict[str, Any]:
        try:
            server = self._server(credentials)
            return self._complete(credentials, server, server.facts(model))
        except ServerProblem as problem:
            raise InvokeServerUnavailableError(str(problem)) from problem

    @staticmethod
    def _complete(credentials: Mapping[str, Any], server: Server, facts: Facts) -> dict[str, Any]:
        """The settings that the base class works with."""
        wanted = str(credentials.get("context_size") or "").strip()
        if wanted and not (wanted.isdecimal() and int(wanted) > 0):
            raise ServerProblem(f"The context size {wanted!r} is no number of tokens. Leave it empty or correct it.")
        sizes = [size for size in (int(wanted or 0), facts.context) if size]
        if not sizes:
            raise ServerProblem(f"{server.endpoint} does not tell the model's context size. Fill in 'Context size'.")

        def on(name: str, said: bool) -> bool:
            setting = credentials.get(name) or "auto"
            return said if setting == "auto" else setting == "support"

        tools = on("tool_calling", facts.tools)
        return {
            "endpoint_url": server.endpoint,
            "api_key": server.api_key,
            "mode": "chat",
            "context_size": str(min(sizes)),
            "max_tokens_to_sample": str(min(sizes)),
            "vision_support": "support" if on("vision_support", facts.vision) else "not_support",
            "function_calling_type": "tool_call" if tools else "no_call",
            "stream_function_calling": "supported" if tools else "not_supported",
        }
