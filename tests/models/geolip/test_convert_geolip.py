"""Checkpoint files become models that compute the same, and what they cannot be is said."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModel

from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction, GeolipModel
from gravity_hf.models.geolip.convert_geolip import (
    convert_geolip_checkpoint,
    export_pt,
    import_pt,
    main,
)

from .two_reconstruction import CFG, PATCH, outputs, published_state, whole_battery_state

CLOSE = {"atol": 1e-5, "rtol": 0.0}


def published(tmp_path: Path, state: Any = None, **content: Any) -> Path:
    """A published two-reconstruction checkpoint."""
    run = {"epoch": 3, "preset": "some", "internal_recovery": 0.9, "external_recovery": 0.8}
    kept = {"model_state": published_state() if state is None else state, "cfg": CFG, **run}
    torch.save({**kept, **content}, tmp_path / "best.pt")
    return tmp_path / "best.pt"


def patches() -> torch.Tensor:
    return torch.randn(2, 7, PATCH, generator=torch.Generator().manual_seed(1))


def small(**changes: Any) -> GeolipForReconstruction:
    torch.manual_seed(0)
    config = {"patch_dim": 12, "num_rows": 3, "hidden_size": 8, "lens_dim": 8, **changes}
    return GeolipForReconstruction(GeolipConfig(**config)).eval()


def state_with(*leave_out: str, **more: Any) -> dict[str, Any]:
    state = {**published_state(), **{key.replace("__", "."): x for key, x in more.items()}}
    return {key: x for key, x in state.items() if not key.startswith(leave_out or "-")}


@pytest.mark.parametrize("changes", [{}, {"lens_sign": "canon"}, {"use_spectral": False}])
@torch.no_grad()
def test_published_model_computes_what_it_was_published_to(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    file = published(tmp_path, cfg={**CFG, **changes})
    model = AutoModel.from_pretrained(convert_geolip_checkpoint(file, tmp_path / "model"))
    assert type(model) is GeolipModel and not model.training
    expected = outputs(published_state(), patches(), **changes)
    found = model(patches(), output_frames=True)
    for name in ("frame", "omega", "omega_attended"):
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
    torch.testing.assert_close(found.reconstruction, expected["external"], **CLOSE)
    internal = model.stem_decoder(found.frame)
    torch.testing.assert_close(internal, expected["internal"], **CLOSE)


@torch.no_grad()
def test_shell_behind_a_whole_autoencoder_computes_what_it_was_published_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its encoder, with normalised blocks and signed rows, then lens, spectral layers, decoder."""
    file = published(tmp_path, whole_battery_state())
    model = import_pt(file, shell_only=True)
    assert "left out, the battery's own decoder: battery.svae.readout.weight" in caplog.text
    expected = outputs(whole_battery_state(), patches())
    found = model(patches(), output_frames=True)
    torch.testing.assert_close(found.frame, expected["frame"], **CLOSE)
    torch.testing.assert_close(found.reconstruction, expected["external"], **CLOSE)
    more = {**whole_battery_state(), "battery.svae.more": torch.ones(2)}
    with pytest.raises(ValueError, match=r"others as well: battery.svae.more \[2\]"):
        import_pt(published(tmp_path, more), shell_only=True)


def test_published_model_learns_in_two_parts(tmp_path: Path) -> None:
    """The decoder behind the lens teaches the encoder nothing, as in published training."""
    model = import_pt(published(tmp_path))
    model.train()(patches()).reconstruction.square().mean().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_published_settings_are_kept(tmp_path: Path) -> None:
    config = import_pt(published(tmp_path)).config
    assert (config.image_size, config.patch_size, config.num_channels) == (8, 2, 3)
    assert (config.max_alpha, config.num_attention_heads, config.lens_seed) == (0.3, 2, 3)
    assert (config.stem_detach, config.block_norm, config.frame_sign) == (True, False, "canon")


def test_state_dict_alone_needs_what_weights_do_not_tell(tmp_path: Path) -> None:
    file = tmp_path / "best.safetensors"
    safetensors.torch.save_file(published_state(), file)
    with pytest.raises(ValueError, match=r"expected ps, channels, n_heads.*--set n_heads=8"):
        import_pt(file)
    known = {name: CFG[name] for name in ("ps", "channels", "n_heads", "max_alpha", "lens_sign")}
    model = import_pt(file, **known, use_spectral=True)
    expected = outputs(published_state(), patches())["external"]
    torch.testing.assert_close(model(patches()).reconstruction, expected, **CLOSE)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown weight": (
        {"state": state_with(growth__stencil=torch.ones(3, 2))},
        r"others as well: growth.stencil \[3, 2\]",
    ),
    "missing weight": (
        {"state": state_with("decoder.blocks.0.2.bias")},
        "decoder.blocks.0.fc2.bias: missing",
    ),
    "odd shape": (
        {"state": state_with(decoder__dec_out__bias=torch.ones(5))},
        r"decoder.proj_out.bias: expected \[12\], got \[5\]",
    ),
    "whole autoencoder": (
        {"state": whole_battery_state()},
        r"battery.svae.readout.weight \[20, 20\].*A geolip has no such parts.*--shell-only",
    ),
    "no battery": ({"state": state_with("battery.")}, "got none under battery.enc.enc_in.weight"),
    "two codebooks": (
        {"state": state_with(aleph__codebook=torch.ones(6, 4))},
        "aleph.codebook: expected the same values as codebook",
    ),
    "setting": ({"cfg": {**CFG, "use_magic": 1}}, "got use_magic. A setting"),
    "size": ({"cfg": {**CFG, "V": 6}}, "V: expected 5, which the weights say, got 6"),
    "value": ({"cfg": {**CFG, "max_alpha": 2.0}}, r"max_alpha: expected a number in \(0, 1\)"),
    "no isometry": (
        {"state": state_with(lens__E=torch.ones(8, 4))},
        r"lens.basis: expected E with",
    ),
    "not finite": ({"state": state_with(codebook=torch.ones(6, 4) / 0)}, "not finite"),
    "other names": (
        {"state": {"layers.0.weight": torch.ones(2, 3)}},
        r"got layers.0.weight \[2, 3\]. What these are for is not known, and nothing is guessed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_checkpoint_leaves_nothing(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    file = published(tmp_path, **content)
    with pytest.raises(ValueError, match=message):
        convert_geolip_checkpoint(file, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


class Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = published(tmp_path, optimizer=Code())
    with pytest.raises(ValueError, match="without running code in it"):
        import_pt(file)
    assert "run" not in capsys.readouterr().out


def test_parts_that_are_not_kept_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import_pt(published(tmp_path, scheduler={"step": 3}))
    assert "left out, as they are not weights: scheduler" in caplog.text
    caplog.clear()
    import_pt(published(tmp_path, cfg={**CFG, "use_spectral": False}))
    assert "left out, as unread: transformer.layers.0.alpha_logits" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lens_mode": "learned", "feature_norm": "whiten", "host_config": {"layer": -2}},
        {"patch_dim": None, "patch_size": 2, "boundary_smooth": True, "stem_detach": True},
        {"spectral_attention": "gravity", "verdict": {"mechanism": "B"}, "block_norm": False},
    ],
)
@torch.no_grad()
def test_exported_model_comes_back(changes: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, with its settings, from a file without code."""
    model = small(**changes)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) / 10)
    back = import_pt(export_pt(model, tmp_path / "geolip.pt"))
    own, found = model.state_dict(), back.state_dict()
    assert list(own) == list(found) and all(torch.equal(own[k], found[k]) for k in own)
    assert torch.equal(model(patches()).reconstruction, back(patches()).reconstruction)
    settings, kept = model.config.to_dict(), back.config.to_dict()
    assert {k for k in settings if settings[k] != kept.get(k)} <= {"decoder_hidden_size", "dtype"}


def test_exported_file_has_the_published_layout(tmp_path: Path) -> None:
    model = small(host_config={"name_or_path": "some"}, verdict={"mechanism": "B"})
    content = torch.load(export_pt(model, tmp_path / "geolip.pt"), weights_only=True)
    assert set(content) == {"model_state_dict", "geo_config", "bert_config", "verdict"}
    said = content["geo_config"]
    assert (said["V"], said["D_base"], said["D_lens"], said["n_layers"]) == (3, 4, 8, 2)
    assert said["shell_hidden"] == said["hidden"] == 8 and said["patch_dim"] == 12
    assert content["bert_config"] == {"name_or_path": "some"}


def test_exported_file_of_another_model_is_refused(tmp_path: Path) -> None:
    """The layout without names that are known: nobody knows what they mean."""
    file = tmp_path / "other.pt"
    for state, settings, message in (
        ({"enc.weight": torch.ones(2, 3)}, {}, r"got enc.weight \[2, 3\]"),
        (small().state_dict(), {"V": 3, "quaternions": True}, "got quaternions"),
        (small().state_dict(), {"V": 4, "patch_dim": 12}, r"encoder.proj_in.weight: expected"),
        (small().state_dict(), {"V": 3, "num_rows": 4}, "num_rows: expected one value, got two"),
    ):
        torch.save({"model_state_dict": state, "geo_config": settings}, file)
        with pytest.raises(ValueError, match=message):
            import_pt(file)


def test_export_overwrites_nothing_and_takes_geolips_only(tmp_path: Path) -> None:
    (tmp_path / "there.pt").write_text("mine")
    with pytest.raises(ValueError, match="expected a new file"):
        export_pt(small(), tmp_path / "there.pt")
    with pytest.raises(ValueError, match="expected a GeolipModel, got a Linear"):
        export_pt(torch.nn.Linear(2, 2), tmp_path / "new.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt"]


def test_command_goes_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder, back = published(tmp_path), tmp_path / "model", tmp_path / "back.pt"

    def run(*arguments: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["convert_geolip", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    assert run(file, folder) == 0 and run(folder, back) == 0
    expected = outputs(published_state(), patches())["external"]
    torch.testing.assert_close(import_pt(back)(patches()).reconstruction, expected, **CLOSE)
    capsys.readouterr()
    assert run(file, folder) == 1
    assert "expected a new or empty folder" in capsys.readouterr().err
