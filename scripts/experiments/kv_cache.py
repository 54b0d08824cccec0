"""What codes of a few bits cost a trained model that reads its long context from them.

    python scripts/experiments/kv_cache.py --device cuda                # results/kv_cache.json
    python scripts/experiments/kv_cache.py --preset cpu --seeds 0 --windows 2 --needles 4
    python scripts/experiments/kv_cache.py --device cuda --pretrained MODEL --text one.txt two.txt
    python scripts/experiments/kv_cache.py --quick --out trial.json      # seconds, to try

The hosts are those of `lean_hosts.py`, or with --pretrained a causal model from any folder, at
their full length. A window of held-out text is read at once except for its last tokens; these
follow in chunks, from the cache of each arm, so that what they attend to has been coded. Every arm
gets the same keys and values of the same prompt. `loss` is of those tokens, in nats; `change` is
against a DynamicCache on the same tokens, and `change_error` the standard error of its mean over
windows. `key_error` and `value_error` say how far what is read lies from what was put in, relative
to its size. The published codec codes everything anew at every chunk, as it does at every token
when it generates.

The arm "newest 128 only" reads no more than these of the prompt: it says what all the rest is worth
to the model. Where that is nothing, codes cannot cost anything either.

A needle is a line that assigns random letters to a name, put into the middle of a window; at its
end the line stands again, and its letters are predicted from the first one on. `copied` is how many
of their tokens are the likeliest one, `whole` how many needles are so throughout; a model that
cannot copy over such a distance shows it in the arm "dynamic".

Transformers' own cache is among the arms where `hqq` is installed.

"gravity" is the host patched and calibrated, without any training: its own DynamicCache is its
control, and `conversion` says what the patch itself costs on the same tokens. A file that is there
is continued, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import torch  # noqa: E402
from kv_needles import NEEDLE_LETTERS, copied, with_needle  # noqa: E402
from lean_hosts import Host, add_host_options, hosts_of, result_name  # noqa: E402
from paired_changes import paired  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import AutoTokenizer, DynamicCache, QuantizedCache  # noqa: E402
from transformers.utils import is_hqq_available, logging  # noqa: E402
from window_losses import wide_head  # noqa: E402

from gravity_hf import GravityConfig, RotatedQuantCache, calibrate, patch_with_gravity  # noqa: E402
from gravity_hf.hub.card_public import public  # noqa: E402
from gravity_hf.integration.cache_memory import cache_bytes  # noqa: E402
from gravity_hf.training.cached_reading import following_logits, read_prompt  # noqa: E402
from gravity_hf.training.conditions import run_conditions  # noqa: E402
from gravity_hf.training.files import write_json  # noqa: E402

RESULTS = HERE / "results"
CONTROL = "dynamic"
NEWEST = 128
FORGETFUL = f"newest {NEWEST} only"
CHUNK = 64


def _rotated(**options: Any) -> Callable[[Any], Any]:
    # From the first token on, so that short trials do what long ones do.
    return lambda config: RotatedQuantCache(config, **{"min_length": 0, **options})


def _both(bits: int, **options: Any) -> Callable[[Any], Any]:
    return _rotated(nbits_k=bits, nbits_v=bits, **options)


ARMS: dict[str, Callable[[Any], Any]] = {
    CONTROL: lambda config: DynamicCache(config=config),
    FORGETFUL: lambda config: DynamicCache(config=config),
    "8 bits": _both(8),
    "4 bits": _both(4),
    "4 bits, not turned": _both(4, rotated=False),
    "4 bits, ranges of float16": _both(4, ranges="half"),
    "4 bits, groups of 32": _both(4, group=32),
    "keys 4, values 2 bits": _rotated(nbits_k=4, nbits_v=2),
    "keys 2, values 4 bits": _rotated(nbits_k=2, nbits_v=4),
    "2 bits": _both(2),
    "2 bits, not turned": _both(2, rotated=False),
    "2 bits, groups of 32": _both(2, group=32),
    "published codec, 4 bits": _both(4, codec="reference"),
}
if is_hqq_available():
    # It packs two groups at a time: of half a head each, their number is even at any length.
    ARMS["transformers' hqq, 4 bits"] = lambda config: QuantizedCache(
        "hqq", config, nbits=4, axis_key=1, axis_value=1, q_group_size=min(64, config.head_dim // 2)
    )
GRAVITY_ARMS = (CONTROL, FORGETFUL, "8 bits", "4 bits", "4 bits, not turned", "2 bits")


def filled(arm: str, config: Any, prompt: DynamicCache) -> Any:
    """The arm's cache after the prompt: as if the model had read it into this cache, which would
    attend to the prompt's own keys as they are in any case."""
    cache = ARMS[arm](config)
    for index, layer in enumerate(prompt.layers):
        cache.update(layer.keys, layer.values, index)
    return cache


def after_prompt(arm: str, model: Any, ids: torch.Tensor, prompt: DynamicCache) -> Any:
    """The arm's cache after `ids` `[1, P]`, whose keys and values are in `prompt`."""
    if arm != FORGETFUL:
        return filled(arm, model.config, prompt)
    cache = ARMS[arm](model.config)
    read_prompt(model, ids[:, -NEWEST:], cache)
    return cache


@torch.no_grad()
def read_errors(cache: Any, prompt: DynamicCache) -> dict[str, float]:
    """Distance of what the next token reads from what was put in, over the size of the latter."""
    wrong, right = [0.0, 0.0], [0.0, 0.0]
    for ours, exact in zip(cache.layers, prompt.layers, strict=True):
        one = exact.keys[:, :, -1:], exact.values[:, :, -1:]
        read = ours.update(*one)
        for which, (got, given) in enumerate(zip(read, (exact.keys, exact.values), strict=True)):
            difference = got[:, :, : given.shape[2]].double() - given.double()
            wrong[which] += float(difference.square().sum())
            right[which] += float(given.double().square().sum())
    keys, values = ((w / r) ** 0.5 for w, r in zip(wrong, right, strict=True))
    return {"key_error": keys, "value_error": values}


def losses(
    model: Any, windows: torch.Tensor, arms: list[str], tail: int, bar: tqdm
) -> dict[str, list[dict[str, float]]]:
    """Of every arm one dict for each window."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for window in windows:
        ids = window[None].to(model.device)
        start = ids.shape[1] - tail
        prompt = DynamicCache(config=model.config)
        read_prompt(model, ids[:, :start], prompt)
        for arm in arms:
            cache = after_prompt(arm, model, ids[:, :start], prompt)
            held = cache_bytes(cache)
            with wide_head(model):
                logits = following_logits(model, ids[:, start:-1], cache, CHUNK)
            loss = torch.nn.functional.cross_entropy(logits[0], ids[0, start + 1 :])
            row = {"loss": float(loss), "bytes_per_token": held / start}
            if not found[arm] and arm != FORGETFUL:
                row |= read_errors(filled(arm, model.config, prompt), prompt)
            found[arm].append(row)
            bar.update()
    return found


def copies(
    model: Any, tokenizer: Any, windows: torch.Tensor, arms: list[str], seed: int, bar: tqdm
) -> dict[str, list[float]]:
    """Of every arm and needle: the share of the tokens of its letters that are the likeliest."""
    generator = random.Random(seed)
    found: dict[str, list[float]] = {arm: [] for arm in arms}

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for window in windows:
        text, asked, letters = with_needle(window, ids_of, generator)
        ids = text[None].to(model.device)
        prompt = DynamicCache(config=model.config)
        read_prompt(model, ids[:, :-asked], prompt)
        for arm in arms:
            cache = after_prompt(arm, model, ids[:, :-asked], prompt)
            logits = following_logits(model, ids[:, -asked:-1], cache, CHUNK)
            found[arm].append(copied(logits[0], ids[0, -asked:], letters) / letters)
            bar.update()
    return found


def measure(host: Host, attention: str, options: argparse.Namespace, bar: tqdm) -> list[Any]:
    """One row for each arm of this host."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = host.load(options.device, dtype)
    arms = list(ARMS)
    tail = min(options.tail, host.length // 4)
    windows = host.held_out(options.windows)
    unpatched: list[dict[str, float]] = []
    if attention == "gravity":
        arms = list(GRAVITY_ARMS)
        unpatched = losses(model, windows, [CONTROL], tail, bar)[CONTROL]
        _patch(model, host)
    of_text = losses(model, windows, arms, tail, bar)
    tokenizer = AutoTokenizer.from_pretrained(host.folder)
    of_needles = copies(model, tokenizer, host.held_out(options.needles), arms, host.seed, bar)
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    rows = [
        {
            "seed": host.seed,
            "attention": attention,
            "arm": arm,
            "length": host.length,
            "tail": tail,
            "dtype": str(dtype).removeprefix("torch."),
            **summary(of_text[arm], of_text[CONTROL], 2 * numbers),
            "needles": len(of_needles[arm]),
            "copied": sum(of_needles[arm]) / len(of_needles[arm]),
            "whole": sum(x == 1 for x in of_needles[arm]) / len(of_needles[arm]),
        }
        for arm in arms
    ]
    if unpatched:
        cost = _paired(of_text[CONTROL], unpatched)
        rows[0] |= {"conversion": cost["change"], "conversion_error": cost["change_error"]}
    return rows


def _patch(model: Any, host: Host) -> None:
    """Gravity in the place of dot products, calibrated and not trained."""
    patch_with_gravity(model, GravityConfig(law="power"))
    sample = host.calibration(4, min(1024, host.length), seed=host.seed)
    batches = [{"input_ids": x} for x in sample.to(model.device).split(1)]
    calibrate(model, batches, progress=False)


def _paired(rows: list[dict[str, float]], control: list[dict[str, float]]) -> dict[str, Any]:
    return paired([row["loss"] for row in rows], [row["loss"] for row in control])


def summary(
    rows: list[dict[str, float]], control: list[dict[str, float]], half: int
) -> dict[str, Any]:
    """`half`: bytes of a token in float16."""
    return {
        "windows": len(rows),
        "loss": sum(row["loss"] for row in rows) / len(rows),
        **_paired(rows, control),
        "ratio": half / rows[0]["bytes_per_token"],
        **{name: rows[0].get(name) for name in ("key_error", "value_error")},
    }


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_host_options(parser)
    add = parser.add_argument
    add("--windows", type=int, default=8, help="of held-out text [8]")
    add("--needles", type=int, default=24, help="windows with a needle [24]")
    add("--tail", type=int, default=1024, help="tokens that follow the prompt [1024]")
    add("--attention", nargs="+", default=["dot_product", "gravity"], help="of the hosts")
    add("--out", type=Path, metavar="FILE.json", help="[results/kv_cache.json]")
    options = parser.parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, found none; use --device cpu")
    unknown = set(options.attention) - {"dot_product", "gravity"}
    if unknown:
        parser.error(f"--attention: expected dot_product, gravity, got {sorted(unknown)}")
    if min(options.windows, options.needles, options.tail) < 1:
        parser.error("--windows, --needles, --tail: expected 1 or more")
    if options.quick:
        options.windows, options.needles = min(options.windows, 2), min(options.needles, 2)
        if options.out is None:
            parser.error("--quick: expected --out too: what is measured then is not to be kept")
    options.out = options.out or RESULTS / result_name("kv_cache", options)
    return options


def finished(file: Path, known: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run under the same conditions."""
    if not file.exists():
        return []
    before = json.loads(file.read_text(encoding="utf-8"))
    same = ("device", "versions", "commit", "settings")
    if any(before["conditions"].get(name) != known.get(name) for name in same):
        return []
    return before["rows"]


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        hosts = hosts_of(options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    known = run_conditions(options.device) | {
        "command": shlex.join(["python", "scripts/experiments/kv_cache.py", *given]),
        "settings": {
            **{name: getattr(options, name) for name in ("windows", "needles", "tail", "quick")},
            **{"chunk": CHUNK, "needle_letters": NEEDLE_LETTERS, "host": hosts[0].described()},
        },
    }
    rows = finished(options.out, public(known))
    todo = list(_todo(hosts, options.attention, rows))
    both = options.windows + options.needles
    steps = {"dot_product": len(ARMS) * both, "gravity": len(GRAVITY_ARMS) * both + options.windows}
    work = sum(steps[attention] for _, attention in todo)
    with tqdm(total=work, desc="kv cache", disable=None) as bar:
        for host, attention in todo:
            rows += measure(host, attention, options, bar)
            report = {"conditions": known, "unit": hosts[0].unit, "host": hosts[0].described()}
            if not options.pretrained:
                report["hosts"] = [host.record for host in hosts]
            report["rows"] = rows
            write_json(options.out, public(report))
    for row in rows:
        print(show(row))


def _todo(
    hosts: list[Host], attentions: list[str], rows: list[dict[str, Any]]
) -> Iterator[tuple[Host, str]]:
    done = {(row["seed"], row["attention"]) for row in rows}
    for host in hosts:
        for attention in attentions:
            if (host.seed, attention) not in done:
                yield host, attention


def show(row: dict[str, Any]) -> str:
    name = f"seed {row['seed']} {row['attention']:<11} {row['arm']:<26}"
    errors = "-" if row["key_error"] is None else f"{row['key_error']:.4f}"
    return (
        f"{name} {row['ratio']:5.2f}x loss {row['loss']:.4f} ({row['change']:+.5f}) keys "
        f"{errors} copied {row['copied']:.2f}"
    )


if __name__ == "__main__":
    main()
