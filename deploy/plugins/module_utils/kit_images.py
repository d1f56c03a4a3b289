"""Have an image on a host: pulled, loaded from an archive, or built from Dify's source.

Runs on the host as a program, one process an image (``kit_images.py SPEC IMAGE``), so that they come side by side and
their progress is seen; the engine is asked by ``docker``. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from ansible.module_utils import kit_build, kit_fetch
except ImportError:  # on the host the files lie side by side, and there is no Ansible
    import kit_build  # type: ignore[import-not-found]
    import kit_fetch  # type: ignore[import-not-found]

TRIES, PAUSE_SECONDS = 3, 5.0
# Asking again helps against a network that stutters, not against these.
FINAL = re.compile(r"no such host|not found|unauthorized|denied|manifest unknown|server gave HTTP response to HTTPS")
# Which of Dify's own images `build` makes: repository -> how.
BUILT = {"langgenius/dify-api": "api", "langgenius/dify-web": "web"}
# Of api/Dockerfile, what needs addresses beside package registries: (what goes, what comes).
API_EDITS = (
    # Node.js out of nodesource's packages: only upstream's development tools need it.
    (r"(?s)    && mkdir -p /etc/apt/keyrings.*?nodesource\.list \\\n    && apt-get update \\\n", ""),
    (r"        nodejs=\S+ \\\n", ""),
    # Versions that Debian's archive has replaced by later ones.
    (r"(?<= )(libldap-2\.5-0|libsqlite3-0|zlib1g)=\S+", r"\1"),
    # The tokenizer's table: the API counts another way without it.
    (r"RUN python -c \"import tiktoken;[^\n]*\n", "RUN mkdir -p ${TIKTOKEN_CACHE_DIR} \\\n"),
)
WEB = """\
FROM {base}
ENV NODE_ENV=production EDITION=SELF_HOSTED DEPLOY_ENV=PRODUCTION PORT=3000 TZ=UTC
ENV MARKETPLACE_API_URL=https://marketplace.dify.ai MARKETPLACE_URL=https://marketplace.dify.ai
COPY --chown=1001:1001 . /app/targets/next
USER 1001:1001
EXPOSE 3000
ENTRYPOINT ["/bin/sh", "/app/targets/next/start.sh"]
"""


class ImageError(Exception):
    """An image that cannot be had; the message says why and what to do."""


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``docker``; its output is returned."""
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)


def present(image: str) -> bool:
    """Whether the host has the image."""
    return docker("image", "inspect", "--format", "{{.Id}}", image).returncode == 0


def remedies(image: str, why: str) -> str:
    """What is wrong with an image, and the three ways to it."""
    return (
        f"The image {image} cannot be had: {why}\nRemedy, one of:\n"
        "  - let Docker's engine reach the registry; a proxy of the engine's own: "
        "https://docs.docker.com/engine/daemon/proxy/\n"
        "  - a registry with a copy: dify_compose_images: mirror, dify_compose_mirror: registry.example.com\n"
        "  - an archive: `make images-archive` where there is a network, then dify_compose_images: archive and "
        "dify_compose_archive; or `docker load` by hand: what is there is not fetched"
    )


def have(spec: Mapping[str, Any], image: str) -> None:
    """Have an image as the site wants it: ``source`` is pull, mirror, archive or build (``dify_compose_images``).

    Raises:
        ImageError: it cannot be had.
    """
    name = image.partition("@")[0].rpartition(":")[0]
    if present(image):
        print(f"{image} is here", flush=True)
    elif spec["source"] == "archive":
        load(Path(spec["archive"]), spec["archive_sha256"])
        if not present(image):
            raise ImageError(
                f"{spec['archive']} does not hold {image}.\nRemedy: `make images-archive` of this release makes one "
                "that does; an image of dify_compose_image is named there with ARGS=--image."
            )
    elif spec["source"] == "build" and name in BUILT:
        build(spec, image, BUILT[name])
    else:
        pull(image)


def pull(image: str, tries: int = TRIES, pause: float = PAUSE_SECONDS) -> None:
    """Fetch an image; the engine's lines of progress are ours.

    Raises:
        ImageError: it cannot be had, with the three remedies.
    """
    why = ""
    for number in range(tries):
        if number:
            print(f"again in {pause:.0f} s", flush=True)
            time.sleep(pause)
        process = subprocess.Popen(
            ["docker", "pull", image], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            why = line.strip() or why
        if process.wait() == 0:
            return
        if FINAL.search(why):
            break
    raise ImageError(remedies(image, why))


def load(archive: Path, sha256: str) -> None:
    """Load an archive of images (``docker save``), proved by its checksum.

    Raises:
        ImageError: it is missing, another file, or none that the engine takes.
    """
    try:
        with archive.open("rb") as stream:
            found = kit_fetch.digest_of(stream).hex()
    except OSError as error:
        raise ImageError(
            f"{archive} cannot be read: {error.strerror}.\nRemedy: put the archive there (dify_compose_archive)."
        ) from None
    if found != sha256.split()[0].lower():
        raise ImageError(
            f"{archive} has sha256 {found}; dify_compose_archive_sha256 says {sha256}.\n"
            "Remedy: copy the archive again, or correct the checksum if you trust this file."
        )
    done = subprocess.run(["docker", "load", "--quiet", "--input", str(archive)], text=True, stderr=subprocess.PIPE)
    if done.returncode:
        raise ImageError(f"Docker does not load {archive}: {done.stderr.strip()}\nRemedy: make the archive again.")


# --- Dify's own, from the checkout ------------------------------------------------------------------------------------


def api_recipe(text: str, base: str) -> str:
    """Upstream's api/Dockerfile on a base image of the site's, and with package registries alone."""
    for pattern, instead in (*API_EDITS, (r"(?m)^FROM \S+ AS base$", f"FROM {base} AS base")):
        text, count = re.subn(pattern, instead, text)
        if not count and "libldap" not in pattern:
            raise ImageError(
                f"api/Dockerfile has nothing like {pattern!r}: upstream has changed it.\n"
                "Remedy: pull the image (dify_compose_images), or teach API_EDITS in kit_images.py the new form."
            )
    return text


def build(spec: Mapping[str, Any], image: str, what: str) -> None:
    """Build one of Dify's images; package registries are reached by the host's network, as the kit's builds do.

    Raises:
        ImageError: the build failed.
    """
    bases = spec["bases"]
    with tempfile.TemporaryDirectory(dir=spec["cache"], prefix=".image-") as folder:
        recipe = Path(folder, "Dockerfile")
        if what == "api":
            try:
                sources = kit_build.ensure_sources(kit_build.Spec.load(spec["build"]), kit_build.DIFY)
            except kit_build.BuildError as error:
                raise ImageError(str(error)) from None
            context = sources / kit_build.DIFY
            recipe.write_text(api_recipe((context / "api/Dockerfile").read_text(), bases["python"]))
            shutil.copy(context / "api/Dockerfile.dockerignore", recipe.with_name("Dockerfile.dockerignore"))
        else:
            context = Path(spec["web"])
            recipe.write_text(WEB.format(base=bases["node"]))
        argv = ["docker", "build", "--network", "host", "--tag", image, "--file", str(recipe)]
        # Without a value the variable is the caller's own: an address may hold a password.
        for name in spec["environment"]:
            argv += ["--build-arg", name]
        env = {**os.environ, **spec["environment"], "DOCKER_BUILDKIT": "1", "BUILDKIT_PROGRESS": "plain"}
        code = subprocess.run([*argv, str(context)], env=env, stderr=subprocess.STDOUT).returncode
    if code:
        raise ImageError(
            f"Docker could not build {image} (status {code}); its own words stand above.\nRemedy: mend what they name "
            "- the base image in dify_compose_base_images must be Debian with apt-get and Python 3.12 (python) or hold "
            "Node.js 22 (node); a Docker without BuildKit needs the package docker-buildx-plugin - or pull the image."
        )


def jobs(
    images: Sequence[str], program: Sequence[str], environment: Mapping[str, str], markers: str, source: str
) -> list[dict[str, Any]]:
    """A job for ``kit_jobs`` each; ``markers`` is a folder for the signs that an image was had."""
    found: list[dict[str, Any]] = []
    for image in images:
        marker = f"{markers}/{re.sub(r'[^A-Za-z0-9.]+', '-', image)}"
        repository = image.partition("@")[0].rpartition(":")[0]
        what = BUILT.get(repository, "") if source == "build" else ""
        found.append(
            {
                "name": "image-" + marker.rpartition("/")[2],
                "title": f"image {image}",
                "argv": [*program, str(image), marker],
                "environment": dict(environment),
                "creates": marker,
                "after": {"api": ["docker"], "web": ["web"]}.get(what, []),
            }
        )
    if source == "archive":
        # One of them loads the archive, the others find what was in it.
        for job in found[1:]:
            job["after"] = [found[0]["name"]]
    return found


def main(argv: list[str]) -> int:
    """``kit_images.py SPEC IMAGE MARKER``: have an image, then make the marker."""
    spec = json.loads(Path(argv[1]).read_text())
    marker = Path(argv[3])
    try:
        have(spec, argv[2])
    except ImageError as error:
        print(error, file=sys.stderr)
        return 1
    marker.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    marker.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
