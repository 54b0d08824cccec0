"""The published two-reconstruction model, written down once more as formulas over its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]

# Small, and no two sizes alike. 3 channels of 2 x 2 are 12 numbers a patch.
CFG: dict[str, Any] = {
    **{"img_size": 8, "channels": 3, "ps": 2, "V": 5, "D_base": 4, "hidden": 10, "D_lens": 8},
    **{"shell_hidden": 14, "n_heads": 2, "n_layers": 3, "max_alpha": 0.3, "alpha_init": -2.0},
    **{"use_real_svae": True, "use_spectral": True, "lens_sign": "signed", "codebook_K": 6},
    **{"cc_temp": 0.1, "seed": 3},
}
PATCH = 12


def published_state(seed: int = 0, **changes: Any) -> State:
    """Random weights under published names."""
    cfg = {**CFG, **changes}
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def linear(name: str, out: int, read: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, read, generator=generator) / read**0.5
        state[f"{name}.bias"] = torch.randn(out, generator=generator) / 3

    def network(start: str, blocks: str, end: str, sizes: tuple[int, int, int]) -> None:
        linear(start, sizes[1], sizes[0])
        linear(f"{blocks}.0.0", sizes[1], sizes[1])
        linear(f"{blocks}.0.2", sizes[1], sizes[1])
        linear(end, sizes[2], sizes[1])

    rows, wide = cfg["V"] * cfg["D_base"], cfg["V"] * cfg["D_lens"]
    hidden, shell, lens = cfg["hidden"], cfg["shell_hidden"], cfg["D_lens"]
    enc = "battery.enc"
    network(f"{enc}.enc_in", f"{enc}.blocks", f"{enc}.enc_out", (PATCH, hidden, rows))
    network("battery.dec_in", "battery.dec_blocks", "battery.dec_out", (rows, hidden, PATCH))
    network("decoder.dec_in", "decoder.blocks", "decoder.dec_out", (wide, shell, PATCH))
    axes = torch.randn(lens, cfg["D_base"], generator=generator)
    state["lens.E"] = torch.linalg.qr(axes)[0].contiguous()
    for index in range(cfg["n_layers"]):
        layer = f"transformer.layers.{index}"
        state[f"{layer}.alpha_logits"] = torch.randn(lens, generator=generator)
        state[f"{layer}.norm.weight"] = 1 + torch.randn(lens, generator=generator) / 3
        state[f"{layer}.norm.bias"] = torch.randn(lens, generator=generator) / 3
        linear(f"{layer}.qkv", 3 * lens, lens)
        linear(f"{layer}.out_proj", lens, lens)
    axes = torch.randn(cfg["codebook_K"], cfg["D_base"], generator=generator)
    state["codebook"] = first_positive(F.normalize(axes, dim=-1))
    state["aleph.codebook"] = state["codebook"].clone()
    return state


def whole_battery_state() -> State:
    """The same with a whole autoencoder in the battery's place, of which only the encoder counts
    behind the lens."""
    state = published_state()
    kept = {key: x for key, x in state.items() if not key.startswith("battery.")}
    for key in [key for key in state if key.startswith("battery.enc.")]:
        name = key.removeprefix("battery.enc.").replace("blocks.0.2", "enc_blocks.0.3")
        kept[f"battery.svae.{name.replace('blocks.0.0', 'enc_blocks.0.1')}"] = state[key]
    hidden, rows = CFG["hidden"], CFG["V"] * CFG["D_base"]
    generator = torch.Generator().manual_seed(4)
    for name, shape in (
        *(("enc_blocks.0.0.weight", (hidden,)), ("enc_blocks.0.0.bias", (hidden,))),
        *(("readout.weight", (rows, rows)), ("dec_in.weight", (hidden, rows))),
        *(("cross_attn.0.alpha_logits", (4,)), ("boundary_smooth.net.0.bias", (8,))),
    ):
        kept[f"battery.svae.{name}"] = torch.randn(*shape, generator=generator)
    return kept


def first_positive(rows: Tensor) -> Tensor:
    """Rows turned so that their first coordinate beyond 1e-6 is positive."""
    first = (rows.abs() > 1e-6).int().argmax(-1, keepdim=True)
    return torch.where(rows.gather(-1, first) < 0, -rows, rows)


def outputs(state: State, patches: Tensor, **changes: Any) -> dict[str, Tensor]:
    """Frame, spectra, and both reconstructions of patches `[B, N, 12]`."""
    cfg = {**CFG, **changes}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def network(start: str, block: str, end: str, x: Tensor) -> Tensor:
        h = F.gelu(linear(start, x))
        return linear(end, h + linear(f"{block}.2", F.gelu(linear(f"{block}.0", h))))

    def whole_battery() -> Tensor:
        start, block = "battery.svae", "battery.svae.enc_blocks.0"
        h = F.gelu(linear(f"{start}.enc_in", patches))
        scale = (state[f"{block}.0.weight"], state[f"{block}.0.bias"])
        normed = F.layer_norm(h, h.shape[-1:], *scale)
        h = h + linear(f"{block}.3", F.gelu(linear(f"{block}.1", normed)))
        return linear(f"{start}.enc_out", h)

    whole = "battery.svae.enc_in.weight" in state
    if whole:
        rows = whole_battery()
    else:
        names = ("battery.enc.enc_in", "battery.enc.blocks.0", "battery.enc.enc_out")
        rows = network(*names, patches)
    rows = rows.unflatten(-1, (cfg["V"], cfg["D_base"]))
    frame = rows / rows.norm(dim=-1, keepdim=True)
    frame = frame if whole else first_positive(frame)
    lifted = frame @ state["lens.E"].T
    if cfg["lens_sign"] == "canon":
        lifted = first_positive(lifted)
    omega = lifted.square().sum(-2).sqrt()
    spectrum = omega
    for index in range(cfg["n_layers"] if cfg["use_spectral"] else 0):
        spectrum = layer(state, f"transformer.layers.{index}", spectrum, cfg)
    modulated = (lifted * spectrum.unsqueeze(-2)).flatten(-2)
    found = {"frame": frame, "omega": omega, "omega_attended": spectrum}
    if not whole:
        names = ("battery.dec_in", "battery.dec_blocks.0", "battery.dec_out")
        found["internal"] = network(*names, frame.flatten(-2))
    names = ("decoder.dec_in", "decoder.blocks.0", "decoder.dec_out")
    return {**found, "external": network(*names, modulated)}


def layer(state: State, name: str, spectrum: Tensor, cfg: dict[str, Any]) -> Tensor:
    width, heads = spectrum.shape[-1], cfg["n_heads"]
    weight, bias = state[f"{name}.norm.weight"], state[f"{name}.norm.bias"]
    normed = F.layer_norm(spectrum, (width,), weight, bias)
    qkv = F.linear(normed, state[f"{name}.qkv.weight"], state[f"{name}.qkv.bias"])
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in qkv.chunk(3, -1))
    weights = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1)
    mixed = (weights @ v).transpose(-2, -3).flatten(-2)
    gate = torch.tanh(
        F.linear(mixed, state[f"{name}.out_proj.weight"], state[f"{name}.out_proj.bias"])
    )
    alpha = cfg["max_alpha"] * torch.sigmoid(state[f"{name}.alpha_logits"])
    return spectrum * (1 + alpha * gate)
