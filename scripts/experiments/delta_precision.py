"""Deltas in packed codes: width against error and bytes, and what the facts make of it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1] / "benchmark")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from results import conditions  # noqa: E402

from gravity_hf.hub.card_public import public  # noqa: E402
from gravity_hf.knowledge.bank import DeltaBank  # noqa: E402
from gravity_hf.knowledge.delta import LowRankDelta  # noqa: E402
from gravity_hf.knowledge.delta_codec import CODEBOOKS, WIDTHS  # noqa: E402
from gravity_hf.knowledge.encoding import BeliefEncoder, EncodingConfig  # noqa: E402
from gravity_hf.knowledge.errors import QuantizationError  # noqa: E402
from gravity_hf.knowledge.fact_metrics import evaluate_facts  # noqa: E402
from gravity_hf.knowledge.facts import load_facts  # noqa: E402
from gravity_hf.knowledge.quantized_delta import TIERS, Tier  # noqa: E402
from gravity_hf.knowledge.quantizing import quantize  # noqa: E402
from gravity_hf.knowledge.statistics import bootstrap_median, rate  # noqa: E402
from gravity_hf.training.files import write_json  # noqa: E402

SCHEMA = "gravity-delta-precision/1"
# Of everything a width can lose, nothing is refused: what it loses is what is measured.
ANY = Tier(9, 1e9, -1.0, 0.0)
SHAPES = {"768 x 768, rank 16": (768, 768, 16), "1536 x 576, rank 2": (1536, 576, 2)}

EPILOG = """\
Kinds of deltas: "gaussian", factors of independent normal numbers in two shapes, and "trained", one
delta for each of some facts of a bank, encoded on the base. `per_item` has a row for each kind,
width, codebook and group: median (with a bootstrap interval) and largest relative Frobenius error
of a map, and bits for each number of the factors, of the whole file. `tiers` says which width each
tier took, and for trained deltas how many facts the coded delta still answers exactly.

  python scripts/experiments/delta_precision.py --base DIR --count 32 --out FILE.json
  python scripts/experiments/delta_precision.py --quick     # Gaussian deltas only
"""


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", type=Path, metavar="DIR", help="a causal LM with its tokenizer, to train on")
    add("--facts", default="invented", help="bank or file of facts [invented]")
    add("--count", type=int, default=32, help="facts that are encoded [32]")
    add("--draws", type=int, default=8, help="Gaussian deltas of each shape [8]")
    add("--groups", nargs="+", type=int, default=[32, 64, 128], help="coordinates with one scale")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="for training [cpu]")
    add("--commit", help="where the tree is a copy without git")
    add("--quick", action="store_true", help="few draws, no base")
    add("--out", type=Path, metavar="FILE.json", help="write everything here")
    options = parser.parse_args(given)
    if options.quick:
        options.draws, options.groups, options.base = 2, [64], None
    return options


def gaussian_deltas(shape: tuple[int, int, int], draws: int) -> list[LowRankDelta]:
    """`draws` deltas of one map."""
    width_in, width_out, rank = shape
    generator = torch.Generator().manual_seed(0)
    return [
        LowRankDelta(
            {
                "map": (
                    torch.randn(rank, width_in, generator=generator),
                    torch.randn(width_out, rank, generator=generator),
                )
            }
        )
        for _ in range(draws)
    ]


def widths(
    kind: str, deltas: Sequence[LowRankDelta], groups: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for each width, codebook and group."""
    rows = []
    for bits in WIDTHS:
        for codebook in CODEBOOKS:
            for group in groups:
                reports = [
                    quantize(d, ANY, widths=[bits], codebooks=[codebook], group=group).report
                    for d in deltas
                ]
                errors = [report.rel_frobenius for report in reports]
                rows.append(
                    {
                        "deltas": kind,
                        "bits": bits,
                        "codebook": codebook,
                        "group": group,
                        "rel_frobenius": bootstrap_median(errors)._asdict(),
                        "largest": max(errors),
                        "bits_per_parameter": sum(r.bits_per_parameter for r in reports)
                        / len(reports),
                    }
                )
    return rows


def tiers(
    kind: str, deltas: Sequence[LowRankDelta], trained: Trained | None
) -> list[dict[str, Any]]:
    """What every tier takes, and what is left of the facts."""
    rows = []
    for number in TIERS:
        found, refused = [], 0
        for delta in deltas:
            try:
                found.append(quantize(delta, number))
            except QuantizationError:
                refused += 1
        row = {
            "deltas": kind,
            "tier": number,
            "refused": refused,
            "bits": sorted({x.report.bits for x in found}),
            "largest": max((x.report.rel_frobenius for x in found), default=None),
            "bytes": [x.report.bytes for x in found],
            "bytes_float32": [x.report.bytes_exact for x in found],
        }
        if trained is not None and not refused:
            row |= trained.kept([x.delta.dequantize() for x in found])
        rows.append(row)
    return rows


class Trained:
    """Facts with a delta each, on the base that they were encoded on."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
        self.model = model.to(options.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(options.base)
        self.facts = load_facts(options.facts)[: options.count]
        self.config = EncodingConfig()
        encoder = BeliefEncoder(self.model, self.tokenizer, self.config)
        self.deltas = [x.delta for x in encoder.encode(self.facts)]

    def kept(self, coded: Sequence[LowRankDelta]) -> dict[str, Any]:
        """Facts that are answered with the exact deltas, and with the coded ones."""
        exact, after = self._answers(self.deltas), self._answers(coded)
        lost = [a["id"] for a, b in zip(exact, after, strict=True) if a["exact"] and not b["exact"]]
        return {
            "exact_answers": rate(x["exact"] for x in exact)._asdict(),
            "coded_answers": rate(x["exact"] for x in after)._asdict(),
            "exact_paraphrases": sum(x["paraphrase_top1"] for x in exact) / len(exact),
            "coded_paraphrases": sum(x["paraphrase_top1"] for x in after) / len(after),
            "lost": lost,
        }

    def _answers(self, deltas: Sequence[LowRankDelta]) -> list[dict[str, Any]]:
        bank = DeltaBank(self.model)
        for fact, delta in zip(self.facts, deltas, strict=True):
            bank.add(fact.id, delta)
        return evaluate_facts(
            self.model,
            self.tokenizer,
            self.facts,
            lambda rows: bank.routed([[row.fact.id] for row in rows]),
            trained_paraphrases=self.config.training_paraphrases,
            trained_unrelated=self.config.training_unrelated,
        )


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "conditions": conditions(options.device, options.commit),
        "command": shlex.join(["python", "scripts/experiments/delta_precision.py", *given]),
        "config": {"groups": options.groups, "draws": options.draws, "seeds": [0]},
        "per_item": [],
        "tiers": [],
    }
    kinds = {f"gaussian {name}": gaussian_deltas(s, options.draws) for name, s in SHAPES.items()}
    trained = Trained(options) if options.base else None
    if trained is not None:
        kinds["trained"] = trained.deltas
        report["config"] |= {"facts": options.facts, "count": len(trained.facts)}
        report["config"]["encoder"] = trained.config.to_dict()
    for kind, deltas in kinds.items():
        report["per_item"] += widths(kind, deltas, options.groups)
        report["tiers"] += tiers(kind, deltas, trained if kind == "trained" else None)
        for row in report["tiers"][-len(TIERS) :]:
            print(f"{kind:<30} tier {row['tier']}: bits {row['bits']}, error {row['largest']:.4f}")
        if options.out:
            write_json(options.out, public(report))


if __name__ == "__main__":
    main()
