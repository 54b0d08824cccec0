"""An LGT in a few lines: token ids, continuous inputs, points of one's own, saving and loading.

    python scripts/examples/lgt_basic_inference.py
    python scripts/examples/lgt_basic_inference.py --preset meta_probe --length 64

The weights are random, so that only shapes and equalities mean anything.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM

import gravity_hf  # noqa: F401  (tells transformers' Auto classes about LGT)
from gravity_hf.cli.console import quiet_libraries
from gravity_hf.models.lgt import LGT_PRESETS, LGTConfig, LGTForCausalLM, LGTModel

VOCABULARY = 1000


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(LGT_PRESETS), default="edge_150k")
    parser.add_argument("--length", type=int, default=16, help="tokens of the input")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    quiet_libraries()
    torch.manual_seed(options.seed)

    config = LGTConfig.from_preset(options.preset, vocab_size=VOCABULARY)
    model = LGTForCausalLM(config).eval()
    ids = torch.randint(VOCABULARY, (1, options.length))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        weights = torch.stack(model(input_ids=ids, output_attentions=True).attentions)
    count = sum(p.numel() for p in model.parameters())
    print(f"{options.preset}: {count:,} parameters with a vocabulary of {VOCABULARY}")
    print(f"ids {tuple(ids.shape)} -> logits {tuple(logits.shape)}")
    # The first token sees nothing else.
    own = weights.diagonal(dim1=-2, dim2=-1)[..., 1:].mean()
    print(f"mean weight of a token on itself: {own:.3f} (1.000 would be no attention at all)")

    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCABULARY
    with torch.no_grad():
        later = model(input_ids=changed).logits[:, :-1]
    moved = (later - logits[:, :-1]).abs().max()
    print(f"the last token changed: logits before it move by {moved:.1e} (causal)")

    continuous = LGTModel(LGTConfig.from_preset(options.preset, vocab_size=None)).eval()
    signal = torch.randn(1, options.length, config.hidden_size)
    line = torch.linspace(0, 1, options.length)[:, None]
    with torch.no_grad():
        learned = continuous(inputs_embeds=signal).last_hidden_state
        own_points = continuous(inputs_embeds=signal, positions=line).last_hidden_state
    print(f"continuous input {tuple(signal.shape)} -> hidden states {tuple(learned.shape)}")
    print(f"with points of one's own on a line they differ by {(learned - own_points).std():.3f}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            equal = torch.equal(again(input_ids=ids).logits, logits)
    print(f"saved and loaded, {type(again).__name__} gives the same logits: {equal}")


if __name__ == "__main__":
    main()
