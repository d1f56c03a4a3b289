"""Write the images of a Dify release into a file, for hosts that reach no registry: ``make images-archive``.

Runs where Docker and a registry are; what Docker has already is not fetched. Prints what the site that loads it sets.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

import ansible.module_utils
import yaml

DEPLOY = Path(__file__).resolve().parents[1]
# Ansible finds the kit's module_utils for modules only.
ansible.module_utils.__path__.append(str(DEPLOY / "plugins" / "module_utils"))
from ansible.module_utils import kit_compose, kit_images  # noqa: E402

# Of upstream's services those that a site in containers may run, see roles/dify_compose.
SERVICES = (
    *("init_permissions", "db_postgres", "redis", "ssrf_proxy", "sandbox", "plugin_daemon", "api", "worker", "web"),
    *("pgvector", "agent_backend", "local_sandbox"),
)


def names(version: str, others: dict[str, str], mirror: str) -> dict[str, str]:
    """The image's name as compose mode runs it -> its name where it is fetched."""
    release = yaml.safe_load((DEPLOY / "releases" / f"{version}.yml").read_text())["compose"]["services"]
    role = yaml.safe_load((DEPLOY.parent / "roles/dify_compose/vars/main.yml").read_text())
    known = {**release, **role["dify_compose_pinned"], **others}
    wanted = [known[service] for service in SERVICES if service in known]
    return {image: kit_compose.mirrored(image, mirror) for image in sorted(set(wanted))}


def main() -> int:
    """Entry point; exit status 2 when an image cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("version", nargs="?", default="1.16.0", help="the Dify release")
    parser.add_argument("--output", type=Path, help="default: dify-<version>-images.tar here")
    parser.add_argument("--mirror", default="", help="a registry with copies, as dify_compose_mirror")
    parser.add_argument("--image", action="append", default=[], metavar="SERVICE=IMAGE", help="as dify_compose_image")
    options = parser.parse_args()
    output = options.output or Path(f"dify-{options.version}-images.tar")
    found = names(options.version, dict(entry.split("=", 1) for entry in options.image), options.mirror)
    for number, (image, fetched) in enumerate(found.items(), 1):
        print(f"{number}/{len(found)} {image}", flush=True)
        try:
            if not kit_images.present(image):
                kit_images.pull(fetched)
                if fetched != image:
                    kit_images.docker("tag", fetched, image)
        except kit_images.ImageError as error:
            print(error, file=sys.stderr)
            return 2
    print(f"writing {output}", flush=True)
    new = output.with_name(f".{output.name}.new")
    saved = subprocess.run(["docker", "save", "--output", str(new), *found]).returncode
    if saved:
        print("docker save failed, see above. Remedy: free space, then again.", file=sys.stderr)
        return 2
    with new.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    new.replace(output)
    Path(f"{output}.sha256").write_text(f"{digest}  {output.name}\n")
    print(
        f"{output}: {output.stat().st_size / 1e9:.1f} GB. Copy it to the host; the site's settings:\n"
        f"dify_compose_images: archive\ndify_compose_archive: /path/on/the/host/{output.name}\n"
        f'dify_compose_archive_sha256: "{digest}"'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
