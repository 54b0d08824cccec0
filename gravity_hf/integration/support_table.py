"""What the sweep over all of transformers' model types found, as data: `support.json`.

Written by `scripts/make_support_table.py`, which builds every model type small and examines it; the
words in which it judges are defined here, so that who writes and who reads agree.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .sites import memoised

SUPPORT_FILE = Path(__file__).with_name("support.json")

# Name of a promise -> what keeping it means.
PROMISES = {
    "patched": "patch_with_gravity takes the model",
    "reached": "a forward pass calls gravity",
    "correct": "every call agrees with the float64 reference on the same q, k, v and mask",
    "differs": "the output is not the host's: gravity really ran",
    "backward": "gradients are finite, those of the masses are the float64 reference's",
    "host": "with the dot product of what gravity is given, the model is the host",
    "cached": "greedy generation with a cache is the one without",
    "reloaded": "saved and loaded it is the same class with the same output",
    "unpatched": "unpatch_gravity gives the host back bit for bit",
    "calibrated": "at softness 16 the output's cosine to the host's is at least 0.99",
    "converges": "at softness 256 at most a quarter of the distance to the host is left",
}

# Status of a model type -> what it means.
STATUSES = {
    "passes": "keeps every promise that applies to it",
    "partly": "runs gravity and breaks a named promise",
    "refused": "refused by name before anything is changed",
    "no routed attention": "computes attention on its own or has none; refused by name",
    "not built": "no small model could be made from its config",
    "no inputs": "no inputs were found that the host itself runs on",
    "no result": "the examination took too long or ended the process",
}

CATEGORIES = (
    "causal LM",
    "multimodal",
    "encoder-decoder",
    "text encoder",
    "vision",
    "audio",
    "other",
)

PASSED = "passed"
# First words of every other outcome; a colon and the reason follow.
WRONG, RAISED, NOT_APPLICABLE = "wrong", "raised", "not applicable"
# Reasons of "not applicable" that lie in what the class is, not in how the examination went.
DOES_NOT_GENERATE, REFUSED_TO_SAVE = "the class does not generate", "refused by name"
_OF_THE_CLASS = {"cached": DOES_NOT_GENERATE, "reloaded": REFUSED_TO_SAVE}


@dataclass(frozen=True)
class SupportRecord:
    """What is known about one model type.

    Attributes:
        model_type: as in `config.json` of the host.
        category: one of `CATEGORIES`.
        model: the class that was examined; "" where none was built.
        status: one of `STATUSES`.
        reason: why not `"passes"`; "" there.
        promises: name -> outcome, one per name in `PROMISES` where the model was patched: "passed",
            or "wrong: ...", "raised: ..." or "not applicable: ...".
        reached: attention modules that attended by gravity, layer numbers as `*`.
        not_reached: attention modules that the inputs did not reach.
        own_attention: classes of attention modules that compute attention on their own.
        cosine: lowest cosine of a row (token) of the calibrated model's output to the host's; None
            if not measured, as the next two.
        whole_cosine: the same of all rows as one vector, by which "calibrated" is judged.
        near_rows: share of the rows with a cosine of at least 0.99.
        notes: what else must be known of promises that were kept.
    """

    model_type: str
    category: str
    model: str = ""
    status: str = "not built"
    reason: str = ""
    promises: Mapping[str, str] = field(default_factory=dict)
    reached: tuple[str, ...] = ()
    not_reached: tuple[str, ...] = ()
    own_attention: tuple[str, ...] = ()
    cosine: float | None = None
    whole_cosine: float | None = None
    near_rows: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def broken(self) -> dict[str, str]:
        """The promises that were tried and not kept."""
        return {
            name: outcome
            for name, outcome in self.promises.items()
            if outcome.startswith((WRONG, RAISED))
        }

    @property
    def keeps_all(self) -> bool:
        """Whether every promise was kept, but for those that the class itself rules out: it does
        not generate, or transformers does not export it and saving is refused by name."""
        ruled_out = {name: f"{NOT_APPLICABLE}: {reason}" for name, reason in _OF_THE_CLASS.items()}
        return self.status == "passes" and all(
            outcome == PASSED or outcome.startswith(ruled_out.get(name, PASSED))
            for name, outcome in self.promises.items()
        )

    @property
    def kept(self) -> tuple[str, ...]:
        """The promises that were tried and kept."""
        return tuple(name for name, outcome in self.promises.items() if outcome == PASSED)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without empty fields."""
        content = {**asdict(self), "promises": dict(self.promises)}
        return {key: value for key, value in content.items() if value not in ("", {}, (), None)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SupportRecord:
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown field, status or outcome, or promises that are not all of
                `PROMISES`.
        """
        values = dict(content)
        outcomes = dict(values.pop("promises", {}))
        unknown = set(values) - {f.name for f in fields(cls)}
        if outcomes:
            unknown |= set(outcomes) ^ set(PROMISES)
        unknown |= {outcome for outcome in outcomes.values() if not _is_outcome(outcome)}
        if unknown or values.get("status") not in STATUSES:
            raise ValueError(
                f"support record of {values.get('model_type')!r}: expected the fields of "
                f"SupportRecord, all promises or none, and a status of {list(STATUSES)}, got "
                f"unknown or missing {sorted(unknown)} and {values.get('status')!r}. Write the "
                "table again: scripts/make_support_table.py"
            )
        promises = {name: outcomes[name] for name in PROMISES} if outcomes else {}
        for name in ("reached", "not_reached", "own_attention", "notes"):
            values[name] = tuple(values.get(name, ()))
        return cls(promises=promises, **values)


def _is_outcome(outcome: str) -> bool:
    return outcome == PASSED or outcome.split(":")[0] in (WRONG, RAISED, NOT_APPLICABLE)


@dataclass(frozen=True)
class SupportTable:
    """`versions` of transformers, torch and python, the `date` and the `commit` at which the model
    types were examined, and one record of each by its model type."""

    versions: Mapping[str, str]
    date: str
    commit: str
    records: Mapping[str, SupportRecord]

    def of(self, model_type: str) -> SupportRecord:
        """The record of a model type.

        Raises:
            ValueError: this version of transformers does not have it.
        """
        if model_type not in self.records:
            near = difflib.get_close_matches(model_type, self.records, n=3)
            raise ValueError(
                f"model type: expected one of transformers {self.versions['transformers']}, got "
                f"{model_type!r}. {'Near it: ' + ', '.join(near) if near else 'None is near it'}"
            )
        return self.records[model_type]

    def by_category(self) -> dict[str, list[SupportRecord]]:
        """The records of every category that has some, in the order of `CATEGORIES`."""
        found = {
            name: [record for record in self.records.values() if record.category == name]
            for name in CATEGORIES
        }
        return {name: records for name, records in found.items() if records}

    def to_json(self) -> str:
        """One line per model type, so that changes can be read."""
        head = {"versions": dict(self.versions), "date": self.date, "commit": self.commit}
        lines = [
            f"  {json.dumps(name)}: {json.dumps(record.to_dict())}"
            for name, record in sorted(self.records.items())
        ]
        body = ",\n".join(lines)
        return json.dumps(head, indent=1)[:-2] + ',\n "records": {\n' + body + "\n }\n}\n"

    @classmethod
    def from_json(cls, text: str) -> SupportTable:
        """The inverse of `to_json`."""
        content = json.loads(text)
        records = {
            name: SupportRecord.from_dict(record) for name, record in content["records"].items()
        }
        return cls(content["versions"], content["date"], content["commit"], records)


_NOT_TRIED = ("not built", "no inputs", "no result")
# Column of the summary -> which records it counts.
_COUNTED: dict[str, Callable[[SupportRecord], bool]] = {
    "model types": lambda record: True,
    "built": lambda record: bool(record.model),
    "patched": lambda record: "patched" in record.kept,
    "reached": lambda record: "reached" in record.kept,
    "no promise broken": lambda record: record.status == "passes",
    "every promise kept": lambda record: record.keeps_all,
    "partly": lambda record: record.status == "partly",
    "refused": lambda record: record.status == "refused",
    "own or no attention": lambda record: record.status == "no routed attention",
    "not tried": lambda record: record.status in _NOT_TRIED,
}
SUMMARY_HEADERS = ("kind of model", *_COUNTED)


def summary(table: SupportTable) -> list[tuple[str, ...]]:
    """The numbers of every category and of all, as rows under `SUMMARY_HEADERS`."""
    groups = {**table.by_category(), "all": list(table.records.values())}
    return [
        (name, *(str(sum(map(counts, records))) for counts in _COUNTED.values()))
        for name, records in groups.items()
    ]


def unreached(table: SupportTable) -> str:
    """A sentence: of how many of those that keep every promise some modules were not looked at."""
    kept = [record for record in table.records.values() if record.keeps_all]
    partly = sum(bool(record.not_reached) for record in kept)
    return (
        f"Of the {len(kept)} that keep every promise, {partly} have attention modules that the "
        "inputs of the examination did not reach."
    )


PROMISE_HEADERS = ("promise", "kept", "not applicable", "broken")


def promise_counts(table: SupportTable) -> list[tuple[str, ...]]:
    """Of the patched model types: how many keep each promise, how many it does not apply to, and
    how many break it; rows under `PROMISE_HEADERS`."""
    patched = [record for record in table.records.values() if record.promises]
    rows: list[tuple[str, ...]] = []
    for name, meaning in PROMISES.items():
        kept = sum(name in record.kept for record in patched)
        broken = sum(name in record.broken for record in patched)
        rows.append((meaning, str(kept), str(len(patched) - kept - broken), str(broken)))
    return rows


@memoised
def support_table() -> SupportTable:
    """The table that came with this version of gravity_hf."""
    return SupportTable.from_json(SUPPORT_FILE.read_text(encoding="utf-8"))
