"""Domains of utterances, such as speech and audio, and weights of a teacher's loss that depend on them.

The corpus names the domain of each utterance in the file of labels beside its index.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic


def _checked(value: Any) -> float | dict[str, float]:
    """Return a weight as it is given in a configuration. ValueError if it can't be one."""
    if not isinstance(value, dict):
        return _number(value, "the weight")
    if not value:
        raise ValueError(
            "there is no domain; give a number, or a number for each domain, such as {speech: 1, audio: 0.1}"
        )
    for domain in value:
        if not isinstance(domain, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", domain):
            raise ValueError(
                f"{domain!r} can't be a domain, whose name has letters, digits, '_' and '-', and begins with a letter or digit"
            )
    weights = {domain: _number(one, f"the weight of domain {domain}") for domain, one in value.items()}
    if not any(weights.values()):
        raise ValueError("the weights of all domains are 0; give one number, 0, to leave the teacher out")
    return weights


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{what} is {value!r}; give a number of at least 0, or one for each domain")
    return number


Weight = Annotated[float | dict[str, float], pydantic.BeforeValidator(_checked)]
"""Weight of a teacher's loss: a number, or one for each domain."""


def counts(weight: Weight) -> bool:
    """Return whether a weight is positive, for some domain at least."""
    return any(weight.values()) if isinstance(weight, dict) else weight > 0


def counted_domains(weight: Weight) -> tuple[str, ...]:
    """Return the domains with a positive weight; none if the weight is a number."""
    return tuple(domain for domain, value in weight.items() if value) if isinstance(weight, dict) else ()


def shown(weight: Weight) -> str:
    """Return a weight as a text, such as ``0.5`` or ``speech 1, audio 0.1``."""
    if isinstance(weight, dict):
        return ", ".join(f"{domain} {value:g}" for domain, value in weight.items())
    return f"{weight:g}"


def read_domains(file: Path, ids: Sequence[str]) -> list[str]:
    """Return the domains of utterances; empty texts where the corpus names none.

    Args:
        file: ``labels.parquet`` beside the index of the corpus, which may be missing.
        ids: Ids of the utterances.

    Raises:
        ValueError: The file is damaged.
    """
    # The student's package takes `Weight` from here, and works without pyarrow.
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not file.is_file():
        return [""] * len(ids)
    try:
        with pq.ParquetFile(file) as labels:
            if "domain" not in labels.schema_arrow.names:  # An earlier version made the index.
                return [""] * len(ids)
            table = labels.read(columns=["id", "domain"])
        places = pc.index_in(pa.array(ids, table["id"].type), value_set=table["id"].combine_chunks())
        codes = table["domain"].cast(pa.string()).combine_chunks().dictionary_encode()
        names: list[str | None] = codes.dictionary.to_pylist()
        found = codes.indices.take(places).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} is damaged; run the index stage again") from error
    return ["" if code is None else names[code] or "" for code in found]


def without_weight(weights: Mapping[str, Weight], ids: Sequence[str], domains: Sequence[str]) -> str | None:
    """Return a sentence about the first teacher that has no weight for the domain of an utterance; None if there is none.

    Args:
        weights: Weight of each teacher, by its name.
        ids: N ids of utterances.
        domains: N domains.
    """
    for name, weight in weights.items():
        if not isinstance(weight, dict):
            continue
        if missing := Counter(domain for domain in domains if domain not in weight):
            domain, count = missing.most_common(1)[0]
            first = ids[domains.index(domain)]
            what = f"the domain {domain}" if domain else "no domain"
            advice = (
                "add the domain to the weights, with 0 if the teacher is not to learn from it"
                if domain
                else "give the manifest of the corpus a column domain, or run the index stage again if it has one"
            )
            return (
                f"teachers.{name}.weight: {count:,} of {len(ids):,} utterances, such as {first}, have {what}, but the weights are for "
                f"{', '.join(weight)}; {advice}"
            )
    return None
