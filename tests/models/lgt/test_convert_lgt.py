"""Published models, converted, compute what they were published to compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from gravity_hf.models.lgt import LGTConfig, LGTForCausalLM, LGTModel
from gravity_hf.models.lgt.attention import Law
from gravity_hf.models.lgt.convert_lgt import convert_lgt_checkpoint, main, model_from_published
from gravity_hf.models.lgt.geometry import geometry_of_positions
from gravity_hf.models.lgt.modeling_lgt import LGTBlock
from gravity_hf.models.published_lgt import core_state
from gravity_hf.models.visibility import Visibility

from .lgt_cases import BLOCKS, MODELS, published

OUTPUTS = {"atol": 2e-5, "rtol": 2e-6}


def settings_of(case: str) -> dict[str, Any]:
    kwargs = published(case).kwargs
    return {} if "preset" in kwargs else {"curvature": kwargs.get("curvature", 0.15)}


def exported(case: str, folder: Path) -> Path:
    """The file that the published exporter would have written."""
    model = published(case)
    metadata = {"config": model.kwargs.get("preset", ""), "n_params": model.parameters}
    content = {"model_state_dict": model.state, "metadata": metadata, "exported_at": 1.0}
    torch.save(content, folder / "lgt.pt")
    return folder / "lgt.pt"


def run(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    x = inputs["x"]
    name = "inputs_embeds" if x.is_floating_point() else "input_ids"
    with torch.no_grad():
        return model(**{name: x}, positions=inputs.get("positions"), **options)


@pytest.mark.parametrize("case", MODELS)
def test_published_model_is_reproduced(case: str, tmp_path: Path) -> None:
    """After a real conversion and load: outputs, every layer's hidden states, attention."""
    expected = published(case).outputs
    folder = convert_lgt_checkpoint(
        exported(case, tmp_path), tmp_path / "model", **settings_of(case)
    )
    has_head = any(key.startswith("head.") for key in published(case).state)
    loaded = (AutoModelForCausalLM if has_head else AutoModel).from_pretrained(folder)
    assert type(loaded) is (LGTForCausalLM if has_head else LGTModel)
    assert loaded.config.softening == 0.0 and not loaded.config.is_causal

    hidden: list[Tensor] = []
    for layer in loaded.base_model.layers:
        layer.register_forward_hook(lambda *call: hidden.append(call[2].hidden))
    fast, exact = run(loaded, published(case).inputs)[0], None
    exact = run(loaded, published(case).inputs, output_attentions=True)
    torch.testing.assert_close(fast, expected["out"], **OUTPUTS)
    torch.testing.assert_close(exact[0], expected["out"], **OUTPUTS)
    torch.testing.assert_close(torch.stack(exact.attentions), expected["attn"], **OUTPUTS)
    for index in range(loaded.config.num_hidden_layers):
        torch.testing.assert_close(hidden[index], expected[f"hidden.layer{index}"], **OUTPUTS)


@pytest.mark.parametrize("case", BLOCKS)
def test_published_block_is_reproduced(case: str) -> None:
    state, kwargs, inputs, outputs, _ = published(case)
    own = {"learnable_masses", "dim_position"}
    config = LGTConfig(
        **{k: v for k, v in kwargs.items() if k not in own}, softening=0.0, is_causal=False
    )
    config._attn_implementation = "sdpa"
    block = LGTBlock(config, 0).eval()
    block.load_state_dict(
        {
            key.removeprefix("layers.0."): tensor
            for key, tensor in core_state({f"layers.0.{k}": x for k, x in state.items()}).items()
        }
    )
    geometry = geometry_of_positions(
        inputs["positions"], config, Visibility(), inputs["x"], table_needed=False
    )
    with torch.no_grad():
        hidden = block(inputs["x"], geometry, Law.of(config)).hidden
    torch.testing.assert_close(hidden, outputs["out"], **OUTPUTS)


@pytest.mark.parametrize("case", MODELS)
def test_parameters_are_the_published_ones_but_token_mass(case: str) -> None:
    model = model_from_published(published(case).state, **{"curvature": 0.1})
    token_mass = model.config.num_hidden_layers * model.config.hidden_size
    assert model.num_parameters() == published(case).parameters - token_mass


def test_half_precision_checkpoint_converts(tmp_path: Path) -> None:
    halves = {k: x.half() for k, x in published("vocab_tied").state.items()}
    torch.save(halves, tmp_path / "half.pt")
    folder = convert_lgt_checkpoint(tmp_path / "half.pt", tmp_path / "model", curvature=0.15)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    logits = run(loaded, published("vocab_tied").inputs).logits
    expected = published("vocab_tied").outputs["out"]
    assert (logits - expected).abs().max() < 0.01 * expected.abs().max()


def test_gradients_agree_with_float64() -> None:
    """Of a published model that mixes: the fast path in float32, the definition in float64."""

    def gradients(dtype: torch.dtype, attention: str) -> dict[str, Tensor]:
        model = model_from_published(published("continuous").state, curvature=0.15)
        model.set_attn_implementation(attention)
        model = model.to(dtype)
        output = model(inputs_embeds=published("continuous").inputs["x"].to(dtype))[0]
        (
            output * torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
        ).sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    exact = gradients(torch.float64, "eager")
    for name, gradient in gradients(torch.float32, "sdpa").items():
        scale = exact[name].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            gradient.double(), exact[name], rtol=1e-4, atol=1e-5 * float(scale), msg=name
        )


def without(case: str, key: str) -> dict[str, Tensor]:
    return {k: x for k, x in published(case).state.items() if k != key}


REFUSED = {
    "no curvature": (published("continuous").state, {}, "curvature: expected"),
    "missing": (without("continuous", "layers.1.norm1.bias"), {}, "layers.1.norm1.bias: missing"),
    "unknown": ({**published("continuous").state, "extra": torch.ones(1)}, {}, "extra: unknown"),
    "untied": (
        {**published("vocab_tied").state, "head.embedding.weight": torch.ones(40, 32)},
        {},
        "expected the same values as embedding.weight",
    ),
    "head lost": (without("continuous", "layers.0.attn.heads.1.G"), {}, "expected heads 0 to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_checkpoint_leaves_nothing(case: str, tmp_path: Path) -> None:
    state, settings, message = REFUSED[case]
    settings = settings if case == "no curvature" else {"curvature": 0.15}
    torch.save(dict(state), tmp_path / "lgt.pt")
    with pytest.raises(ValueError, match=message):
        convert_lgt_checkpoint(tmp_path / "lgt.pt", tmp_path / "model", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["lgt.pt"]


def test_int8_checkpoint_is_refused_with_the_reason(tmp_path: Path) -> None:
    content = {"layers.0.ffn.0._packed_params._packed_params": torch.ones(1)}
    torch.save(content, tmp_path / "int8.pt")
    with pytest.raises(ValueError, match="got an int8 model.*quantize='none'"):
        convert_lgt_checkpoint(tmp_path / "int8.pt", tmp_path / "model", curvature=0.15)


def changed(key: str, tensor: Tensor) -> dict[Any, Any]:
    assert key in published("continuous").state
    return {**published("continuous").state, key: tensor}


FFN, MASS = "layers.0.ffn.0.weight", "layers.0.attn.heads.1.mass_proj.weight"
NORM = "final_norm.weight"
WEIGHT = published("continuous").state[FFN]
NO_WEIGHTS = {
    **{
        str(dtype): (changed(FFN, WEIGHT.to(dtype)), f"{FFN}: expected dense.*got {dtype}")
        for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)
    },
    "not finite": (changed(FFN, WEIGHT * torch.nan), f"{FFN}: .* values that are not finite"),
    "sparse": (changed(FFN, WEIGHT.to_sparse()), f"{FFN}: .*got torch.sparse_coo"),
    "meta": (changed(FFN, WEIGHT.to("meta")), f"{FFN}: .*a tensor without values"),
    "scalar": (changed(FFN, torch.ones(())), "The checkpoint is damaged"),
    "vector": (changed("pos_embedding.positions", torch.ones(3)), "The checkpoint is damaged"),
    "norm": (changed(NORM, torch.ones(())), "The checkpoint is damaged"),
    "embedding": (
        {**published("continuous").state, "embedding.weight": torch.ones(3)},
        "embedding.weight: expected a matrix",
    ),
    "widths": (changed(MASS, torch.ones(1, 3)), "expected heads of one width, got"),
    "integer key": ({**published("continuous").state, 3: torch.ones(1)}, "got the key 3"),
}


@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_weights_that_are_none_are_refused(case: str) -> None:
    state, message = NO_WEIGHTS[case]
    with pytest.raises(ValueError, match=message):
        model_from_published(state, curvature=0.15)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = exported("edge_150k", tmp_path).read_bytes()
    file = tmp_path / "damaged.pt"
    for content in (whole[: len(whole) // 2], whole[:100], b"some text\n", b"", b"\xff" * 9):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged.pt: expected tensors and plain values"):
            convert_lgt_checkpoint(file, tmp_path / "model", curvature=0.15)
    torch.save({3: torch.ones(1)}, file)
    with pytest.raises(ValueError, match="got the key 3"):
        convert_lgt_checkpoint(file, tmp_path / "model", curvature=0.15)
    with pytest.raises(ValueError, match=r"a preset \['x'\] that is not known"):
        model_from_published(published("continuous").state, {"config": ["x"]})


def test_targets_that_cannot_become_a_folder_are_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    for target in ("link", "dangling", "file/model", "dangling/model", "file"):
        with pytest.raises(ValueError, match="expected a new or empty folder for the model, got"):
            convert_lgt_checkpoint(tmp_path / "nothing.pt", tmp_path / target)


@pytest.mark.parametrize(
    "setting",
    [{"curvature": float("nan")}, {"max_force": -1.0}, {"dropout": 2.0}, {"event_horizon": 0.0}],
)
def test_settings_out_of_range_are_plain_value_errors(setting: dict[str, float]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=rf"^LGTConfig\.{name}: expected"):
        model_from_published(published("continuous").state, **{"curvature": 0.15, **setting})


def test_command_converts_and_explains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["convert_lgt", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        output = capsys.readouterr()
        return int(end.value.code or 0), output.out + output.err

    assert "python -m gravity_hf.models.lgt.convert_lgt" in call("--help")[1]
    source = str(exported("edge_150k", tmp_path))
    status, text = call(source, str(tmp_path / "model"))
    assert status == 0 and "written" in text
    assert AutoModel.from_pretrained(tmp_path / "model").config.curvature == 0.10
    status, text = call(source, str(tmp_path / "model"))
    assert status == 1 and "not empty" in text and "Traceback" not in text
    status, text = call(source, str(tmp_path / "other"), "--max-force", "-1")
    assert status == 1 and "LGTConfig.max_force" in text and "Traceback" not in text
