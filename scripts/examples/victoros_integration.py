"""An LGT as a runtime module: a ledger that nobody can edit unseen, a mirror of its forces, and
growth that changes nothing at the moment it happens.

    python scripts/examples/victoros_integration.py
    python scripts/examples/victoros_integration.py --ledger run/ledger.jsonl

What the mirror reports are the forces of the forward itself, before and after their cap.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from gravity_hf.models.lgt import LGTConfig, LGTForCausalLM
from gravity_hf.runtime import (
    LGTVictorOSModule,
    VictorOSBaseModule,
    registered_modules,
    verify,
    victoros_module,
)

VOCABULARY = 64


@victoros_module("echo", "1.0.0", description="Gives back what it gets.")
class Echo(VictorOSBaseModule):
    """The smallest module: the decorator adds `ledger` and `mirror_layer`."""

    def process(self, x: torch.Tensor) -> torch.Tensor:
        self.ledger.log("echo", {"shape": list(x.shape)})
        return x


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="forwards that the module does")
    parser.add_argument("--ledger", type=Path, help="a new JSONL file (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        run(options.ledger or Path(scratch, "ledger.jsonl"), options.steps)


def run(file: Path, steps: int) -> None:
    config = LGTConfig.from_preset("edge_150k", vocab_size=VOCABULARY, max_position_embeddings=64)
    model = LGTForCausalLM(config).eval()
    module = LGTVictorOSModule(model, agent_id="example", persist_path=file)
    for _ in range(steps):
        result = module.process(torch.randint(VOCABULARY, (1, 24)))
    print(f"{steps} forwards, stability {result['stability']:.3f}")
    for layer in module.mirror_layer.report().layers:
        head = layer.heads[0]
        print(
            f"  layer {layer.layer}: mean force {layer.mean_force:.2f}, largest "
            f"{max(h.max_force for h in layer.heads):.2f}, head 0: entropy {head.entropy:.2f} "
            f"nats, mean mass {head.mean_mass:.2f}"
        )

    proposal = module.propose_architecture_change(stability_threshold=0.5)
    print(f"proposed: {proposal}")
    if proposal is not None:
        ids = torch.randint(VOCABULARY, (1, 24))
        with torch.no_grad():
            before = model(input_ids=ids).logits
            change = module.apply_architecture_change(proposal)
            moved = (model(input_ids=ids).logits - before).abs().max()
        print(f"  applied: {change.change}, {change.before:g} -> {change.after:g}")
        print(f"  outputs moved by {moved:.1e} at that moment")

    Echo().process(torch.zeros(2))
    print(f"registered: {', '.join(sorted(registered_modules()))}")
    module.ledger.flush()
    print(f"ledger: {verify(file)}")
    with tempfile.TemporaryDirectory() as scratch:
        edited = Path(scratch, file.name)
        shutil.copy(f"{file}.head", f"{edited}.head")
        text = file.read_text(encoding="utf-8")
        edited.write_text(text.replace("inference", "nothing", 1), encoding="utf-8")
        print(f"a copy with one word changed: {verify(edited)}")


if __name__ == "__main__":
    main()
