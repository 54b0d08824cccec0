"""Memory of one case on a CPU, in MiB. A process's peak never falls, so each case has its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]

import timing  # noqa: E402
from problems import Case, Shape, make_problem  # noqa: E402
from providers import backend_of, prepare  # noqa: E402

_FEW = 16


def extra_mib_in_a_fresh_process(case: Case, dtype: str) -> float:
    """`timing.extra_mib` of `case`, with as many threads as this process has."""
    command = [sys.executable, str(HERE), json.dumps(asdict(case)), "--dtype", dtype]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", help="problems.Case as JSON")
    parser.add_argument("--dtype", required=True, help="of q, k, v")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fields = json.loads(options.case)
    case = Case(**{**fields, "shape": Shape(**fields["shape"])})
    # A call before, so that what a first call loads is not counted.
    few = min(_FEW, case.shape.queries)
    small = replace(case, shape=replace(case.shape, batch=1, queries=few, keys=_FEW))
    dtype = getattr(torch, options.dtype)
    with backend_of(case.provider):
        prepare(small, make_problem(small, "cpu", dtype))()
        run = prepare(case, make_problem(case, "cpu", dtype))
        print(timing.extra_mib(run, "cpu"))


if __name__ == "__main__":
    main()
