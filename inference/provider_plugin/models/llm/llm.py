"""Language and vision-language models of an OpenAI-compatible server."""

from collections.abc import Generator, Mapping
from typing import Any

import dify_plugin
import requests
from dify_plugin.entities.model import AIModelEntity, DefaultParameterName
from dify_plugin.entities.model.llm import LLMResult, LLMResultChunk
from dify_plugin.entities.model.message import (
    AssistantPromptMessage,
    ImagePromptMessageContent,
    PromptMessage,
    PromptMessageTool,
    TextPromptMessageContent,
    UserPromptMessage,
)
from dify_plugin.errors.model import CredentialsValidateFailedError, InvokeBadRequestError, InvokeError
from models.errors import explained, refused
from models.images import ImageProblem, check, estimate
from models.server import Facts, Server, ServerProblem
from models.thinking import ThinkingMarks, without_thoughts

# As in main.py: how long the SDK waits for a server.
ANSWER_SECONDS = dify_plugin.DifyPluginEnv().MAX_REQUEST_TIMEOUT


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
        messages = fit_for_server(prompt_messages, int(complete["images"]))
        parameters = {**model_parameters, **({"stream_options": {"include_usage": True}} if stream else {})}
        try:
            answer = super()._invoke(model, complete, messages, parameters, tools, stop, stream, user)
        except (InvokeError, requests.RequestException) as error:
            raise explained(error, complete["endpoint_url"], ANSWER_SECONDS) from error
        return self._pieces(answer, complete["endpoint_url"]) if stream else answer

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

    def _transform_invoke_error(self, error: Exception) -> InvokeError:
        """Leaves errors alone that have been explained; the SDK would make all of them the same."""
        if isinstance(error, InvokeError):
            return error
        wrapped: InvokeError = super()._transform_invoke_error(error)
        return wrapped

    def get_num_tokens(
        self,
        model: str,
        credentials: dict[str, Any],
        prompt_messages: list[PromptMessage],
        tools: list[PromptMessageTool] | None = None,
    ) -> int:
        """An estimate for Dify, which makes room for the answer with it; the base class counts no images."""
        parts = [part for message in prompt_messages if isinstance(message.content, list) for part in message.content]
        images = [part.base64_data for part in parts if isinstance(part, ImagePromptMessageContent)]
        return int(super().get_num_tokens(model, credentials, prompt_messages, tools)) + sum(map(estimate, images))

    def _get_num_tokens_by_gpt2(self, text: str) -> int:
        """An estimate: the SDK's tokenizer fetches its vocabulary from the internet at first use."""
        return len(text.encode()) // 4 + 1

    @staticmethod
    def _pieces(chunks: Generator[LLMResultChunk, None, None], endpoint: str) -> Generator[LLMResultChunk, None, None]:
        marks = ThinkingMarks()
        try:
            for chunk in chunks:
                message = chunk.delta.message
                if isinstance(message.content, str):
                    message.content = marks.feed(message.content)
                    if chunk.delta.usage is not None:  # the last one
                        message.content += marks.flush()
                yield chunk
        except (requests.RequestException, ValueError) as error:
            raise explained(error, endpoint, ANSWER_SECONDS) from error

    @staticmethod
    def _server(credentials: Mapping[str, Any]) -> Server:
        return Server(str(credentials.get("endpoint_url") or ""), str(credentials.get("api_key") or ""))

    def _known(self, model: str, credentials: Mapping[str, Any]) -> dict[str, Any]:
        try:
            server = self._server(credentials)
            return self._complete(credentials, server, server.facts(model))
        except ServerProblem as problem:
            kind = type(refused(problem.status or 503, "", ""))
            raise kind(str(problem)) from problem

    @staticmethod
    def _complete(credentials: Mapping[str, Any], server: Server, facts: Facts) -> dict[str, Any]:
        """The settings that the base class works with, and `images`: the most with one question."""

        def number(name: str, title: str) -> int:
            wanted = str(credentials.get(name) or "").strip()
            if wanted and not (wanted.isdecimal() and int(wanted) > 0):
                raise ServerProblem(f"{title} {wanted!r} is no number above 0. Leave it empty or correct it.", 400)
            return int(wanted or 0)

        sizes = [size for size in (number("context_size", "The context size"), facts.context) if size]
        if not sizes:
            raise ServerProblem(
                f"{server.endpoint} does not tell the model's context size. Fill in 'Context size'.", 400
            )

        def on(name: str, said: bool) -> bool:
            setting = credentials.get(name) or "auto"
            return said if setting == "auto" else setting == "support"

        tools = on("tool_calling", facts.tools)
        sees = on("vision_support", facts.images > 0)
        # Whoever fills it in may know better than a trial of an hour ago.
        images = number("max_images", "The number of images") or facts.images or 1
        return {
            "endpoint_url": server.endpoint,
            "api_key": server.api_key,
            "mode": "chat",
            "context_size": str(min(sizes)),
            "max_tokens_to_sample": str(min(sizes)),
            "vision_support": "support" if sees else "not_support",
            "images": str(images if sees else 0),
            "function_calling_type": "tool_call" if tools else "no_call",
            "stream_function_calling": "supported" if tools else "not_supported",
        }


def fit_for_server(messages: list[PromptMessage], most: int) -> list[PromptMessage]:
    """The conversation as the server takes it: at most `most` images, the newest; no reasoning of earlier answers.

    Dify sends the images of earlier questions again with each new one, so a long conversation would pass every limit.

    Raises InvokeBadRequestError where the newest question itself has too many images, or one that cannot be read.
    """
    asked = max((i for i, message in enumerate(messages) if isinstance(message, UserPromptMessage)), default=-1)
    fitting: list[PromptMessage] = []
    left = most
    for i in range(len(messages) - 1, -1, -1):
        message = messages[i]
        if isinstance(message, AssistantPromptMessage) and isinstance(message.content, str):
            message = message.model_copy(update={"content": without_thoughts(message.content)})
        elif isinstance(message.content, list):
            images = [part for part in message.content if isinstance(part, ImagePromptMessageContent)]
            if i == asked:
                _check_question(images, most)
            gone = {id(image) for image in images[: max(0, len(images) - left)]}
            left -= len(images) - len(gone)
            if gone:
                note = TextPromptMessageContent(data="(An image that was here before is not shown again.)")
                parts = [part for part in message.content if id(part) not in gone]
                message = message.model_copy(update={"content": [note, *parts]})
        fitting.append(message)
    return fitting[::-1]


def _check_question(images: list[ImagePromptMessageContent], most: int) -> None:
    if images and not most:
        raise InvokeBadRequestError("This model does not see images. Choose one that does, or ask without an image.")
    if len(images) > most:
        raise InvokeBadRequestError(
            f"This model takes at most {most} image{'s' if most > 1 else ''} with a question, not {len(images)}. "
            "Send fewer."
        )
    for number, image in enumerate(images, 1):
        if image.base64_data:  # else it is an address, which the server reads itself
            try:
                check(image.base64_data, image.filename or f"Image {number}")
            except ImageProblem as problem:
                raise InvokeBadRequestError(str(problem)) from problem
