"""Three streams that read each other: what the world says, shifted by what the environment says.

    python scripts/examples/trimodel_fusion.py               # about a minute on one core
    python scripts/examples/trimodel_fusion.py --steps 50

The answer to each token of the world is that token plus the first token of the environment, so that
only the fusion of the two streams can give it. The streams differ in length.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from gravity_hf.models.trimodel import TriModel, TriModelConfig

VOCABULARY, WORLD, SELF, ENV = 8, 6, 4, 3


def make_streams(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random ids of the three streams, `[rows, length]`."""
    lengths = {"world": WORLD, "self": SELF, "env": ENV}
    draw = {"generator": generator}
    return {
        f"{n}_input_ids": torch.randint(VOCABULARY, (rows, k), **draw) for n, k in lengths.items()
    }


def answers(streams: dict[str, Tensor]) -> Tensor:
    """`[rows, WORLD]`."""
    return (streams["world_input_ids"] + streams["env_input_ids"][:, :1]) % VOCABULARY


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    draw = torch.Generator().manual_seed(options.seed)

    config = TriModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        dim_position=16,
        max_position_embeddings=32,
        output_dim=VOCABULARY,
        use_gate=True,
        dropout=0.0,
    )
    model = TriModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(options.steps):
        streams = make_streams(64, draw)
        logits = model(**streams).last_hidden_state
        loss = F.cross_entropy(logits.flatten(0, 1), answers(streams).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 5) == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)

    model.eval()
    streams = make_streams(256, draw)
    with torch.no_grad():
        output = model(**streams, output_diagnostics=True)
        right = (output.last_hidden_state.argmax(-1) == answers(streams)).float().mean()
    print(f"fused {tuple(output.last_hidden_state.shape)}, accuracy {right:.2f} (chance 0.12)")
    masses = ", ".join(
        f"{name} {mass:.2f}"
        for name, mass in zip(("world", "self", "env"), output.stream_masses.mean(0), strict=True)
    )
    print(f"|G| of the fusion {output.fusion_G:.3f}; mean masses: {masses}")
    snapshot = model.get_tri_snapshot(*(x[:1] for x in streams.values()))
    print(f"a snapshot on token ids has: {', '.join(snapshot)}")


if __name__ == "__main__":
    main()
