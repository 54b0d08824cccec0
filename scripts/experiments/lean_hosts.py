"""The hosts that the experiments on sparse and small models measure on: byte-level Llamas.

    python scripts/experiments/lean_hosts.py --folder hosts --device cuda
    python scripts/experiments/lean_hosts.py --folder hosts --preset cpu --seeds 0
    python scripts/experiments/lean_hosts.py --folder hosts --data stories=one.txt,two.txt
    python scripts/experiments/lean_hosts.py --folder hosts --quick     # seconds, to try

Each is trained from scratch under PyTorch's SDPA: most steps on short windows, which teach more in
the same time, the last ones on windows of the full length. The text is `--data NAME=FILE[,FILE]`,
whose last tenth is held out, or the source of Python's standard library, of which other files are
held out. A host is an ordinary folder of transformers' with `host.json` beside the weights; one
that is there already, trained on the same text in the same way, is not trained again.

From other scripts:

    from lean_hosts import host_at
    for host in host_at(folder, preset="gpu", seeds=(0, 1, 2)):
        model = host.load("cuda", torch.bfloat16)
        loss = mean_loss(model, host.held_out(32).split(1))
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

STDLIB = "stdlib"
RECORD = "host.json"
RATE = 1.5e-3


class Stage(NamedTuple):
    """Steps of `rows` windows of so many tokens; `length` None: the host's own."""

    steps: int
    rows: int
    length: int | None = None


@dataclass(frozen=True)
class Preset:
    """Sizes of a Llama, the longest windows it is trained on, in tokens, and its training."""

    sizes: dict[str, Any]
    length: int
    stages: tuple[Stage, ...]
    rate: float = RATE


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, inner: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64 if hidden > 64 else 16,
        "intermediate_size": inner,
        "tie_word_embeddings": True,
    }


PRESETS = {
    "gpu": Preset(_sizes(384, 8, 6, 2, 1024), 8192, (Stage(800, 32, 1024), Stage(200, 4))),
    "cpu": Preset(_sizes(256, 4, 4, 2, 768), 4096, (Stage(400, 8, 256), Stage(8, 2)), 3e-3),
    "quick": Preset(_sizes(32, 2, 4, 2, 64), 256, (Stage(12, 8, 64), Stage(4, 2)), 4e-3),
}


@dataclass(frozen=True)
class Host:
    """A trained host: an ordinary folder, and what was written down about its training.

    `record`: preset, sizes, stages, losses, text and conditions, as in `host.json`.
    """

    seed: int
    folder: Path
    length: int
    record: dict[str, Any]
    files: tuple[str, ...] = ()

    @property
    def text(self) -> Any:
        """The `TokenStream` that windows are taken from."""
        return stream(self.files)

    @property
    def shelf(self) -> Path:
        """The folder for what is learnt about this host."""
        return self.folder

    @property
    def unit(self) -> str:
        return "nats per byte of held-out text"

    @property
    def heal_rate(self) -> float:
        """AdamW's where it is trained on: a third of the rate that it was trained with."""
        return self.record["settings"]["rate"] / 3

    def described(self) -> dict[str, Any]:
        """What a result says of its host, apart from its seed; `apart`: whether each seed has
        windows of its own."""
        settings = {name: x for name, x in self.record["settings"].items() if name != "seed"}
        known = {name: self.record[name] for name in ("parameters", "tokens", "text")}
        name = f"a Llama that lean_hosts.py trained, {settings['preset']}"
        more = {"length": self.length, "unit": self.unit, "apart": False}
        return {"name": name, **more, "settings": settings, **known}

    def load(self, device: str = "cpu", dtype: Any = None) -> Any:
        """A fresh model under SDPA, in evaluation mode; `dtype` None: float32."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=dtype or torch.float32, attn_implementation="sdpa"
        )
        return model.to(device).eval()

    def held_out(self, count: int, length: int | None = None) -> Any:
        """Ids `[<= count, length]` of text that no host was trained on, evenly spread."""
        windows = self._consecutive(count, length or self.length)
        return windows.__getitems__(list(range(len(windows))))

    def calibration(self, count: int, length: int | None = None, seed: int = 0) -> Any:
        """Ids `[count, length]` from random places of the training text."""
        from gravity_hf.training.streams import RandomWindows

        windows = RandomWindows(self.text.train, count, length or self.length, seed=10_000 + seed)
        return windows.__getitems__(list(range(count)))

    def _consecutive(self, count: int, length: int) -> Any:
        from gravity_hf.training.streams import ConsecutiveWindows

        return ConsecutiveWindows(self.text.validation, count, length)


def host_at(
    folder: str | Path,
    *,
    length: int | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    preset: str = "gpu",
    data: str = STDLIB,
    device: str | None = None,
) -> list[Host]:
    """The hosts of these seeds under `folder`, trained now unless they are there.

    Args:
        folder: where hosts live, `PRESET-TEXT-LENGTH-SEED` each.
        length: tokens of the longest windows; None: the preset's.
        seeds: of the weights and of the windows.
        preset: a name of `PRESETS`.
        data: "stdlib" or `NAME=FILE[,FILE]`.
        device: to train on; None: CUDA where there is one.

    Raises:
        ValueError: no such preset or file, or a folder that holds a host trained in another way.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {list(PRESETS)}, got {preset!r}")
    name, files = text_of(data)
    length = length or PRESETS[preset].length
    hosts = []
    for seed in seeds:
        place = Path(folder) / f"{preset}-{name}-{length}-{seed}"
        settings = _settings(preset, length, seed, files)
        record = _known(place, settings) or _train(place, settings, files, device)
        hosts.append(Host(seed, place, length, record, files))
    return hosts


def text_of(data: str) -> tuple[str, tuple[str, ...]]:
    """`(name, files)` of `--data`; the standard library has no files."""
    name, _, listed = data.partition("=")
    files = tuple(file for file in listed.split(",") if file)
    if not files and name != STDLIB:
        raise ValueError(f"--data: expected {STDLIB} or NAME=FILE[,FILE], got {data!r}")
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise ValueError(f"--data: expected files, got {missing}, which are none")
    return name, files


@functools.cache
def stream(files: tuple[str, ...]) -> Any:
    """The text as bytes: a `TokenStream`, read once."""
    from gravity_hf.training.streams import load_stream

    return load_stream("byte", list(files) or None)


def _settings(preset: str, length: int, seed: int, files: tuple[str, ...]) -> dict[str, Any]:
    chosen = PRESETS[preset]
    stages = [[s.steps, s.rows, s.length or length] for s in chosen.stages]
    return {
        "preset": preset,
        "length": length,
        "seed": seed,
        "sizes": chosen.sizes,
        "stages": stages,
        "rate": chosen.rate,
        "text": stream(files).digest,
    }


def _known(place: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    file = place / RECORD
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["settings"] != settings:
        differ = [name for name, value in settings.items() if record["settings"].get(name) != value]
        raise ValueError(
            f"{place}: expected a host trained with today's {differ}, found another. Delete the "
            "folder or choose another one"
        )
    return record


def _train(
    place: Path, settings: dict[str, Any], files: tuple[str, ...], device: str | None
) -> dict[str, Any]:
    """Train one host into its folder. Its record is written last: without it there is no host."""
    from lean_training import train_host

    from gravity_hf.training.files import write_json

    record = train_host(place, settings, stream(files), device)
    write_json(place / RECORD, record)
    return record


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """`--hosts --preset --data --pretrained --text --held-out --seeds --length --device --quick
    --commit`, as every script on these hosts has them."""
    add = parser.add_argument
    add("--hosts", "--folder", type=Path, default=Path("runs/lean_hosts"), help="their folder")
    add("--preset", choices=list(PRESETS), help="of hosts [cuda: gpu, cpu: cpu]")
    add("--data", default=STDLIB, metavar="NAME=FILE[,FILE]", help=f"[{STDLIB}]")
    add("--pretrained", metavar="FOLDER", help="this causal model in place of trained hosts")
    add("--text", nargs="+", default=[], metavar="FILE", help=f"of --pretrained; or {STDLIB}")
    add("--held-out", type=float, default=0.5, help="share of each --text [0.5]")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of hosts [0 1 2]")
    add("--length", type=int, help="tokens of the longest windows [the preset's, the model's]")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--quick", action="store_true", help="the preset quick: seconds, to try")
    add("--commit", help="where the tree is a copy without git")


def hosts_of(options: argparse.Namespace) -> list[Host]:
    """The hosts that `add_host_options` asks for."""
    if options.commit:
        os.environ["GRAVITY_HF_COMMIT"] = options.commit
    place = place_of(options)
    return [host_of({**place, "seed": seed}) for seed in options.seeds]


def place_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a run needs besides its seed to find its host; JSON-able.

    Raises:
        ValueError: no such text, or the options of one kind of host with the other kind.
    """
    usual = "cpu" if options.device == "cpu" else "gpu"
    preset = options.preset or ("quick" if options.quick else usual)
    place = {
        "preset": preset,
        "length": options.length,
        "data": options.data,
        "device": options.device,
        "hosts": str(options.hosts),
    }
    text_of(options.data)
    if not options.pretrained:
        if options.text:
            raise ValueError("--text: expected --pretrained beside it; trained hosts have --data")
        return place
    if not options.text:
        raise ValueError("--pretrained: expected --text FILE..., to measure it on")
    texts = {"text": list(options.text), "held_out": options.held_out}
    return {**place, "pretrained": options.pretrained, **texts}


def host_of(run: dict[str, Any]) -> Host:
    """The host of a run: of its `seed`, at its place (`place_of`)."""
    if run.get("pretrained"):
        from pretrained_host import pretrained_at

        how = {"length": run["length"], "share": run["held_out"], "preset": run["preset"]}
        place = (run["pretrained"], run["text"], run["hosts"])
        return pretrained_at(*place, seeds=(run["seed"],), **how)[0]
    known = {name: run[name] for name in ("length", "preset", "data", "device")}
    return host_at(run["hosts"], seeds=(run["seed"],), **known)[0]


def result_name(stem: str, options: argparse.Namespace, usual: str = "") -> str:
    """Of a result file: that of a pretrained host stands beside those of trained ones."""
    kind = "pretrained" if options.pretrained else usual
    return f"{stem}_{kind}.json" if kind else f"{stem}.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_host_options(parser)
    options = parser.parse_args(arguments)
    if options.pretrained:
        parser.error("--pretrained: expected hosts to train, got one that is")
    try:
        hosts = hosts_of(options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    for host in hosts:
        record = host.record
        print(
            f"{host.folder.name}: {record['parameters'] / 1e6:.1f} M parameters, held-out loss "
            f"{record['held_out_loss']:.4f}, trained in {record['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
