from typing import Any

from dify_plugin import ToolProvider


class WordsProvider(ToolProvider):
    """A provider without credentials."""

    def _validate_credentials(self, credentials: dict[str, Any]) -> None:
        """Nothing to prove."""
