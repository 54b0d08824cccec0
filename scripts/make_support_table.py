"""Examine every model type of the installed transformers and write the support table.

    python scripts/make_support_table.py --jobs 16
    python scripts/make_support_table.py --types qwen2 bert      # only these, into the same table
    python scripts/make_support_table.py --resume                # go on where it was stopped

Each model type is built small and examined by tests/integration/sweep in a process of its own. The
table goes to gravity_hf/integration/support.json, its summary into README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]
# Read when the libraries are imported: no network, one thread per process.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import transformers  # noqa: E402
from integration.sweep.categories import all_model_types  # noqa: E402
from integration.sweep.processes import examine_all  # noqa: E402
from make_tables import write_tables  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers.utils import logging  # noqa: E402

from gravity_hf.integration.support_table import (  # noqa: E402
    SUPPORT_FILE,
    SupportRecord,
    SupportTable,
)
from gravity_hf.training.conditions import run_conditions  # noqa: E402
from gravity_hf.training.files import write_text  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="only these model types")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one model type")
    parser.add_argument("--resume", action="store_true", help="keep what a stopped run finished")
    parser.add_argument("--out", type=Path, default=SUPPORT_FILE, help="where the table goes")
    options = parser.parse_args(arguments)
    unknown = set(options.types or ()) - set(all_model_types())
    if unknown:
        parser.error(f"--types: transformers {transformers.__version__} has no {sorted(unknown)}")
    return options


def versions() -> dict[str, str]:
    return run_conditions("cpu")["versions"]


def read_journal(journal: Path) -> dict[str, SupportRecord]:
    """The finished records of a stopped run with the same versions."""
    head, *lines = journal.read_text(encoding="utf-8").splitlines()
    if json.loads(head) != versions():
        sys.exit(f"{journal}: made with {head}, expected {versions()}. Leave out --resume")
    records = {}
    for line in lines:
        # A line may be cut where the run was stopped.
        with contextlib.suppress(json.JSONDecodeError):
            record = SupportRecord.from_dict(json.loads(line))
            records[record.model_type] = record
    return records


def records_of_table(table_file: Path) -> dict[str, SupportRecord]:
    """What a table already says, for a run over some types only."""
    if not table_file.is_file():
        return {}
    table = SupportTable.from_json(table_file.read_text(encoding="utf-8"))
    if table.versions != versions():
        sys.exit(f"{table_file}: made with {table.versions}, expected {versions()}. Use --out")
    return dict(table.records)


def examine_into(journal: Path, model_types: list[str], options: argparse.Namespace) -> None:
    """Append one line per finished model type."""
    # Whatever ended the last run may have left half a line.
    with journal.open("a", encoding="utf-8") as file, tqdm(total=len(model_types)) as bar:
        file.write("\n")
        for record in examine_all(model_types, options.jobs, options.limit):
            file.write(json.dumps(record.to_dict()) + "\n")
            file.flush()
            bar.set_postfix_str(f"{record.model_type}: {record.status}")
            bar.update()


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    records = records_of_table(options.out) if options.types else {}
    journal = options.out.with_suffix(".jsonl")
    if not (options.resume and journal.is_file()):
        write_text(journal, json.dumps(versions()) + "\n")
    done = read_journal(journal)
    wanted = options.types or all_model_types()
    examine_into(journal, [name for name in wanted if name not in done], options)
    records |= read_journal(journal)
    known = run_conditions("cpu")
    date, commit = known["date"][:10], known.get("commit", "unknown")[:10]
    write_text(options.out, SupportTable(versions(), date, commit, records).to_json())
    journal.unlink()
    if options.out == SUPPORT_FILE:
        write_tables()


if __name__ == "__main__":
    main()
