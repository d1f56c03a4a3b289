"""Filters for the role dify_compose: see module_utils/kit_compose.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible.errors import AnsibleFilterError

# Ansible finds the kit's module_utils for modules only; a filter is imported as it is.
ansible.module_utils.__path__.append(str(Path(__file__).parents[1] / "module_utils"))
from ansible.module_utils import kit_compose, kit_dify, kit_images


def settings(
    site: Mapping[str, Any], daemon: Mapping[str, Any], network: Mapping[str, str], vector_password: str, keys: int
) -> dict[str, Any]:
    """``dify_source_site | kit_compose_settings(plugin_daemon_site, network, password, keys)``: the site's .env."""
    try:
        return dict(kit_compose.settings(kit_compose.inside(site, daemon, network, vector_password, int(keys))))
    except kit_dify.SettingsProblem as problem:
        raise AnsibleFilterError(str(problem)) from None


def images(services: Mapping[str, str], wanted: Iterable[str], mirror: str = "") -> dict[str, str]:
    """``services | kit_compose_images(names, mirror)``: those services' images, by a mirror's names."""
    return {service: kit_compose.mirrored(services[service], mirror) for service in wanted}


def image_jobs(
    names: Iterable[str], program: list[str], environment: dict[str, str], markers: str, source: str
) -> list[dict[str, Any]]:
    """``images | kit_image_jobs(program, environment, folder, source)``: a job for ``kit_jobs`` each."""
    return list(kit_images.jobs(list(names), program, environment, markers, source))


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"kit_compose_settings": settings, "kit_compose_images": images, "kit_image_jobs": image_jobs}
