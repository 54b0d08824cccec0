"""A byte-level LGT learns the help text that Python carries; its loss beside counting.

    python scripts/examples/lgt_language_model.py                 # about a minute on one core
    python scripts/examples/lgt_language_model.py --steps 1500

The unigram line is what knowing the frequencies of bytes is worth, the bigram line what also
knowing the byte before is worth: a model above them has not learnt to use its context.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gravity_hf.models.lgt import LGTConfig, LGTForCausalLM
from gravity_hf.training.counting import fit_counts
from gravity_hf.training.text import embedded_english

BYTES = 256


def windows(ids: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """`[count, length + 1]` from random places of ids `[tokens]`."""
    starts = torch.randint(len(ids) - length - 1, (count, 1), generator=generator)
    return ids[starts + torch.arange(length + 1)]


def loss_of(model: LGTForCausalLM, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="bytes in a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", default="The value of ")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    draw = torch.Generator().manual_seed(options.seed)

    ids = torch.tensor(list(embedded_english().encode()))
    cut = int(0.9 * len(ids))
    train, held_out = ids[:cut], ids[cut:]
    validation = windows(held_out, options.length, 64, draw)
    baselines = {n: fit_counts(train, BYTES, n).loss([validation]) for n in (1, 2)}

    config = LGTConfig(
        vocab_size=BYTES,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        dim_position=16,
        max_position_embeddings=256,
        dropout=0.0,
    )
    model = LGTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in range(options.steps):
        loss = loss_of(model, windows(train, options.length, options.batch, draw))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 6) == 0:
            print(f"step {step:5d}  training loss {loss.item():.3f}", flush=True)

    model.eval()
    with torch.no_grad():
        found = loss_of(model, validation).item()
    count = sum(p.numel() for p in model.parameters())
    print(f"held out, nats per byte: LGT ({count:,} parameters) {found:.3f}")
    print(f"  unigram {baselines[1]:.3f}, bigram {baselines[2]:.3f}, uniform {math.log(BYTES):.3f}")
    beaten = [name for n, name in ((1, "unigram"), (2, "bigram")) if found < baselines[n]]
    print(f"  it beats: {', '.join(beaten) or 'neither; train it longer'}")
    prompt = torch.tensor([list(options.prompt.encode())])
    room = config.max_position_embeddings - prompt.shape[1]
    how = {"do_sample": True, "temperature": 0.7, "max_new_tokens": min(120, room)}
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **how)
    print(repr(bytes(written[0].tolist()).decode(errors="replace")))


if __name__ == "__main__":
    main()
