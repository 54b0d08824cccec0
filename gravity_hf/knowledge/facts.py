"""Facts as rows: what is asked, what is answered, and what must stay as it was.

A file of facts is JSON Lines in UTF-8, one object a line with the fields of `Fact`; a `.json` file
with one list of such objects is read too. Banks that come with the library are named instead of a
path.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ValidationError
from .fact_checks import row_faults, set_faults
from .fact_files import read_rows, write_lines

if TYPE_CHECKING:
    from datasets import Dataset

BANKS = ("chemistry", "computing", "general", "invented")
_FOLDER = Path(__file__).parent / "banks"
_SHOWN = 20


@dataclass(frozen=True)
class Fact:
    """One statement, as a prompt that its answer completes.

    Args:
        id: unique in its set, `"chemistry/symbol/gold"`.
        domain: of the bank, `"chemistry"`.
        relation: what is said of the subject, `"symbol"`; facts of one relation are alike.
        subject: `"gold"`.
        prompt: ends where the answer begins, without the space between them.
        answer: one to three words, without a leading space.
        aliases: other answers that count as right.
        paraphrases: at least three other prompts for the same answer.
        unrelated: at least two prompts near in subject or wording with another answer, which
            teaching this fact must not change.
        source: a kind of reference where anybody can look it up.
        license: of the row, as SPDX writes it.
    """

    id: str
    domain: str
    relation: str
    subject: str
    prompt: str
    answer: str
    aliases: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    unrelated: tuple[str, ...] = ()
    source: str = ""
    license: str = ""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt and its paraphrases."""
        return (self.prompt, *self.paraphrases)

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer and its aliases."""
        return (self.answer, *self.aliases)

    def accepts(self, text: str) -> bool:
        """Whether `text`, a continuation of a prompt, begins with one of the answers.

        The answer has to end where a word of `text` ends. Case counts, as in `Co` and `CO`.
        """
        begun = text.lstrip()
        rests = (begun[len(x) :] for x in self.answers if begun.startswith(x))
        return any(not rest[:1].isalnum() for rest in rests)

    def to_row(self) -> dict[str, Any]:
        """The fact as an object of strict JSON: text and lists of text."""
        row = dataclasses.asdict(self)
        return {name: list(x) if isinstance(x, tuple) else x for name, x in row.items()}

    @classmethod
    def from_row(cls, row: object, *, where: str = "fact") -> Fact:
        """The fact in an object of JSON.

        Args:
            where: what the error message calls `row`.

        Raises:
            ValidationError: a field is missing, unknown or of another type.
        """
        fields = {x.name: x for x in dataclasses.fields(cls)}
        if not isinstance(row, dict):
            raise ValidationError(f"{where}: expected an object, got {type(row).__name__}")
        required = {name for name, x in fields.items() if x.default is dataclasses.MISSING}
        if missing := sorted(required - set(row)):
            raise ValidationError(f"{where}: expected the field {missing[0]!r}, got none")
        if unknown := sorted(set(row) - set(fields)):
            raise ValidationError(
                f"{where}: expected the fields {', '.join(fields)}, got also {unknown[0]!r}. A "
                "file in a published schema is read by convert_published_facts"
            )
        return cls(**{name: _field(x, fields[name].type, where, name) for name, x in row.items()})


def _field(value: object, kind: object, where: str, name: str) -> Any:
    if kind == "str":
        if isinstance(value, str):
            return value
        raise ValidationError(f"{where}: expected text as {name!r}, got {value!r}")
    if isinstance(value, list | tuple) and all(isinstance(x, str) for x in value):
        return tuple(value)
    raise ValidationError(f"{where}: expected a list of text as {name!r}, got {value!r}")


def load_facts(name_or_path: str | os.PathLike[str]) -> list[Fact]:
    """The facts of a bank or a file, in its order, checked by `validate_facts`.

    Args:
        name_or_path: a name in `BANKS`, or a path that ends in `.jsonl` or `.json`.

    Raises:
        FileNotFoundError: neither a bank nor a file.
        ValidationError: not such a file, too large, or with rows that `validate_facts` refuses.
    """
    path = _bank_or_path(name_or_path)
    facts = [Fact.from_row(row, where=where) for where, row in read_rows(path)]
    if not facts:
        raise ValidationError(f"{path}: expected facts, got an empty file")
    validate_facts(facts)
    return facts


def _bank_or_path(name_or_path: str | os.PathLike[str]) -> Path:
    if name_or_path in BANKS:
        return _FOLDER / f"{name_or_path}.jsonl"
    path = Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"facts: expected one of the banks {', '.join(BANKS)}, or the path of a .jsonl or "
            f".json file, got {os.fspath(name_or_path)!r}: there is no such file"
        )
    if path.suffix not in (".jsonl", ".json"):
        raise ValidationError(f"{path}: expected a file that ends in .jsonl or .json")
    return path


def validate_facts(facts: Iterable[Fact]) -> None:
    """Refuse facts that cannot be taught or measured honestly, naming every row at once.

    Refused are empty fields; ids, prompts or paraphrases that occur twice, also in two facts;
    a prompt or paraphrase that contains the answer; fewer than three paraphrases or two unrelated
    prompts; and an unrelated prompt that belongs to a fact with the same answer.

    Raises:
        ValidationError: with one line a fault, at most 20 of them.
    """
    facts = list(facts)
    faults = [f"{x.id or '(no id)'}: {fault}" for x in facts for fault in row_faults(x)]
    faults += set_faults(facts)
    if faults:
        shown = faults[:_SHOWN] + ["..."] * (len(faults) > _SHOWN)
        raise ValidationError(
            f"expected facts that can be taught and measured, got {len(faults)} faults:\n"
            + "\n".join(shown)
        )


def write_facts(facts: Sequence[Fact], path: str | os.PathLike[str]) -> None:
    """Write `facts` as JSON Lines: the whole file or, after a crash, the older one.

    Raises:
        ValidationError: `validate_facts` refuses them, or the path does not end in `.jsonl`.
    """
    target = Path(path)
    if target.suffix != ".jsonl":
        raise ValidationError(f"{target}: expected a path that ends in .jsonl")
    validate_facts(facts)
    write_lines([x.to_row() for x in facts], target)


def facts_dataset(name_or_path: str | os.PathLike[str]) -> Dataset:
    """The facts as a `datasets.Dataset`, one row a fact, lists as lists.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError, ValidationError: see `load_facts`.
    """
    try:
        from datasets import Dataset, Features, List, Value
    except ImportError as error:
        raise ImportError(
            "facts_dataset needs the package datasets: pip install 'gravity_hf[train]', or use "
            "load_facts, which does not"
        ) from error
    one = Value("string")
    kinds = {x.name: one if x.type == "str" else List(one) for x in dataclasses.fields(Fact)}
    rows = [fact.to_row() for fact in load_facts(name_or_path)]
    return Dataset.from_list(rows, features=Features(kinds))
