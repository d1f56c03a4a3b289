"""The provider holds no credentials of its own: each model names its server."""

from collections.abc import Mapping
from typing import Any

from dify_plugin import ModelProvider


class KitInferenceProvider(ModelProvider):
    """Models of OpenAI-compatible servers."""

    def validate_provider_credentials(self, credentials: Mapping[str, Any]) -> None:
        """There is nothing to validate before a model is named."""
