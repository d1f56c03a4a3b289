"""The provider holds no credentials of its own: each model names its server."""

from dify_plugin import OAICompatProvider


class KitInferenceProvider(OAICompatProvider):
    """Models of OpenAI-compatible servers."""
