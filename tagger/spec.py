"""What decides a result: the spec, and the key of a text under it.

Keys are ours and not derived from any library's internals, so that no upgrade can invalidate a paid-for cache.
Golden tests pin both functions: a change here makes every user pay for every text again.
"""

import hashlib
import json
import re
import unicodedata
from functools import cache
from typing import Any

from tagger.dataset import Dataset

INSTRUCTIONS_VERSION = 1
"""Raised when the instructions in `tagger.prompt` change."""

OUTPUT_SCHEMA_VERSION = 1
"""Raised when the shape of the answer that `tagger.prompt` asks for changes."""

NORMALISATION_VERSION = 1
"""Raised when `normalise` changes."""

MARKS = 250
"""Combining marks in a row that no text to be read has. Python takes a time that grows with the square of their number
to put them in order, which is hours for ten megabytes of them; where there are more, they are sorted before."""

PARAMS_WITHOUT_EFFECT = frozenset(
    {
        "extra_headers",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "timeout",
        "user",
    }
)
"""Request parameters that change how a text is asked and billed, never what is answered."""


def spec_of(dataset: Dataset) -> dict[str, Any]:
    """Return everything that decides a result, as plain JSON values.

    `examples` and `confidence` are in it only where the dataset has them: what was tagged without keeps its id.
    """
    params = {k: v for k, v in dataset.llm.params.items() if k not in PARAMS_WITHOUT_EFFECT}
    spec: dict[str, Any] = {
        "allow_none": dataset.allow_none,
        "instructions": INSTRUCTIONS_VERSION,
        "max_tags": dataset.max_tags,
        "model": dataset.llm.model,
        "normalisation": NORMALISATION_VERSION,
        "output_schema": OUTPUT_SCHEMA_VERSION,
        "params": params,
        "prompt": dataset.prompt.strip(),
        "revision": dataset.revision,
        "tags": [{"description": tag.description.strip(), "id": tag.id} for tag in dataset.tags],
    }
    if dataset.examples:
        spec["examples"] = [{"tags": example.tags, "text": example.text.strip()} for example in dataset.examples]
    if dataset.confidence:
        spec["confidence"] = True
    return spec


def spec_id(dataset: Dataset) -> str:
    """Return the spec's id: the first 12 hex digits of SHA-256 over its canonical JSON."""
    canonical = json.dumps(spec_of(dataset), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def normalise(text: str) -> str:
    """Return the form in which two texts count as the same: NFKC, line ends unified, no surrounding white space."""
    unified = text.replace("\r\n", "\n").replace("\r", "\n")
    if len(unified) > 2 * MARKS and _marks("{2}").search(unified[::MARKS]):
        unified = _marks(f"{{{MARKS},}}").sub(_in_order, unified)
    return unicodedata.normalize("NFKC", unified).strip()


@cache
def _marks(times: str) -> re.Pattern[str]:
    """Return what finds so many combining marks in a row."""
    known = (c for c in map(chr, range(0x20000)) if unicodedata.combining(c) or unicodedata.decomposition(c))
    marks = (c for c in known if all(map(unicodedata.combining, unicodedata.normalize("NFKD", c))))
    return re.compile(f"[{''.join(marks)}]{times}")


def _in_order(marks: re.Match[str]) -> str:
    """Return combining marks in the order in which the normal form has them."""
    decomposed = "".join(unicodedata.normalize("NFKD", mark) for mark in marks[0])
    return "".join(sorted(decomposed, key=unicodedata.combining))


def text_key(spec: str, normalised: str) -> str:
    """Return the key of a normalised text under the spec id `spec`: 32 hex digits."""
    return hashlib.sha256(f"{spec}\n{normalised}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
