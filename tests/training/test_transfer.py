"""Attention transfer: what is compared, what flows on, what learns, what is left as it was."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from training.transfer_cases import END_TO_END, LAYERWISE, calibrated, moved_lora, padded_inputs
from transformers import AutoModel

from gravity_hf import GravityConfig, patch_with_gravity
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.layers.parameters import GravityParameters
from gravity_hf.training.teaching import host_dropout_off
from gravity_hf.training.transfer import (
    TransferSettings,
    train_only_gravity,
    transfer_losses,
)


@pytest.mark.parametrize("family", ["qwen2", "bert", "one module called by all layers"])
def test_in_layerwise_mode_the_host_s_own_activations_flow_on(family):
    host, inputs = tiny_host(family), padded_inputs(family)
    model = patch_with_gravity(tiny_host(family)).train()
    settings = TransferSettings(mode="layerwise", weights=1.0)
    inputs["output_hidden_states"] = True
    states = transfer_losses(model, inputs, settings).outputs.hidden_states
    # The host itself attends under the mask that transformers makes for SDPA, in evaluation mode.
    host.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = host(**inputs).hidden_states
    for ours, theirs in zip(states, expected, strict=True):
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=2e-6)


def test_the_layerwise_loss_is_what_each_layer_does_to_the_host_s_own_tensors():
    """Recomputed by hand in float64 from the host's q, k, v: values and gradients."""
    family = "qwen2"
    model, inputs = calibrated(family).double(), padded_inputs(family)
    seen = {}

    class Spy:
        def __init__(self, name):
            self.name = name

        def attend(self, call):
            seen[self.name] = call
            return call.dot_product()

    modules = gravity_modules(model)
    for name, module in modules.items():
        module.float().observer = Spy(name)
    logits(model, inputs)
    for module in modules.values():
        module.observer = None

    def by_hand(shift=0.0):
        total = 0.0
        for index, (name, module) in enumerate(modules.items()):
            call = seen[name]
            q, k, v = (x.double() for x in (call.query, call.key, call.value))
            k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
            mass, softening = (x.double() for x in module()[:2])
            mass = mass.clone()
            if index == 1:
                mass[2] += shift
            radius = module.key_radius_sq.double().repeat_interleave(3)[:, None, None]
            distance = q.square().sum(-1, keepdim=True) + radius - 2 * q @ k.transpose(-2, -1)
            score = mass.square()[:, None, None] / (
                distance.clamp(min=0) + softening[:, None, None]
            )
            hidden = call.mask < -1e30
            ours = score.masked_fill(hidden, -1e300).softmax(-1) @ v
            dot = q @ k.transpose(-2, -1) * call.scaling
            host = dot.masked_fill(hidden, -1e300).softmax(-1) @ v
            real = inputs["attention_mask"].bool()
            for row in range(len(real)):
                error = (ours - host)[row][:, real[row]].square().sum()
                total += error / host[row][:, real[row]].square().sum() / len(real) / len(modules)
        return total

    result = transfer_losses(model, inputs, LAYERWISE)
    torch.testing.assert_close(result.total, by_hand(), rtol=1e-6, atol=0)
    result.total.backward()
    module = list(modules.values())[1]
    step = 1e-5
    slope = (by_hand(step) - by_hand(-step)) / (2 * step)
    expected = slope * torch.sigmoid(module.mass_log[2].double())
    assert math.isclose(module.mass_log.grad[2].item(), expected.item(), rel_tol=1e-4)


def test_end_to_end_loss_gradients_agree_with_finite_differences():
    model, inputs = calibrated().double(), tiny_inputs("qwen2")
    settings = TransferSettings(outputs=1.0, weights=0.5, logits=0.5, temperature=2.0, states=0.5)
    for module in gravity_modules(model).values():
        module.float()
    transfer_losses(model, inputs, settings).total.backward()
    module = list(gravity_modules(model).values())[0]
    for parameter in (module.mass_log, module.softening_log):
        values = []
        size = 2.0**-6
        for sign in (1, -1):
            with torch.no_grad():
                parameter[1] += sign * size
                values.append(transfer_losses(model, inputs, settings).total.item())
                parameter[1] -= sign * size
        slope = (values[0] - values[1]) / (2 * size)
        assert math.isclose(parameter.grad[1], slope, rel_tol=2e-3)


def test_end_to_end_at_a_huge_softness_there_is_nothing_to_learn():
    inputs = padded_inputs()
    settings = TransferSettings(weights=1.0, logits=1.0, states=1.0)
    near = transfer_losses(calibrated(softness=500.0), inputs, settings).losses
    far = transfer_losses(calibrated(softness=0.5), inputs, settings).losses
    assert set(near) == {"outputs", "weights", "logits", "states"}
    for name, value in near.items():
        assert value < 1e-3 * far[name], name


def test_with_lora_the_teacher_is_the_untouched_host_bit_for_bit():
    """The teacher must not move with the adapters it teaches."""
    inputs = padded_inputs()
    settings = TransferSettings(outputs=0.0, logits=1.0)
    taught = {}
    for name, model in (("lora", moved_lora()), ("untouched", calibrated())):
        heads = []
        head = next(m for n, m in model.named_modules() if n.endswith("lm_head"))
        head.register_forward_hook(lambda m, a, output, heads=heads: heads.append(output.detach()))
        transfer_losses(model, inputs, settings)
        taught[name], student = heads
        assert not torch.equal(taught[name], student)
    assert torch.equal(taught["lora"], taught["untouched"])
    host = tiny_host("qwen2")
    host.set_attn_implementation("sdpa")
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(taught["lora"][real], logits(host, inputs)[real], rtol=0, atol=2e-6)


def test_the_teacher_leaves_frozen_adapters_frozen_and_modes_as_they_were():
    model = moved_lora().train()
    model.get_submodule("base_model.model.model.layers.1").eval()
    with train_only_gravity(model):
        flags = [p.requires_grad for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        assert sum(flags) == 6
        transfer_losses(model, tiny_inputs("qwen2"), END_TO_END).total.backward()
        assert [p.requires_grad for p in model.parameters()] == flags
        assert [m.training for m in model.modules()] == modes
    assert all(
        (p.grad is not None) == flag for p, flag in zip(model.parameters(), flags, strict=True)
    )


@pytest.mark.parametrize("family", ["qwen2", "bert", "cross attention"])
def test_checkpointing_gives_the_loss_and_the_gradients_of_no_checkpointing(family):
    """Checkpointed layers run again in the backward pass: that must not be taken for a new call."""
    settings = TransferSettings(weights=0.5, logits=0.5, loss=0.1)

    def run(checkpointing):
        model = moved_lora(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = padded_inputs(family)
        with host_dropout_off(model):
            result = transfer_losses(model, {**inputs, "labels": inputs["input_ids"]}, settings)
            result.total.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return result, gradients

    (plain, gradients), (checkpointed, again) = run(False), run(True)
    assert torch.equal(plain.total, checkpointed.total)
    assert any(g.abs().max() > 0 for n, g in gradients.items() if "mass_log" in n)
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def test_every_trainable_parameter_gets_a_gradient():
    """The projections after the last attention feed no term; DDP waits for their gradient."""
    model = moved_lora().train()
    transfer_losses(model, tiny_inputs("qwen2"), END_TO_END).total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("mode", ["layerwise", "end_to_end"])
def test_a_module_that_all_layers_share_is_compared_at_every_call(mode):
    family = "one module called by all layers"
    model, inputs = calibrated(family, num_hidden_layers=3), tiny_inputs(family)
    deep = transfer_losses(model, inputs, TransferSettings(mode=mode)).total
    shallow = calibrated(family, num_hidden_layers=1)
    shallow.load_state_dict(model.state_dict())
    first = transfer_losses(shallow, inputs, TransferSettings(mode=mode)).total
    assert deep != first and deep > 0


@pytest.mark.parametrize("mode", ["layerwise", "end_to_end"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_teaches_nothing(mode, side):
    settings = TransferSettings(mode=mode, weights=1.0)
    inputs = padded_inputs(side=side)
    losses = transfer_losses(calibrated(), inputs, settings).losses
    inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), 5)
    other = transfer_losses(calibrated(), inputs, settings).losses
    assert losses == other


def test_logits_are_compared_where_a_label_asks_for_a_prediction():
    """A causal model predicts label t + 1 at t; the first label and -100 ask for nothing."""
    model, inputs = calibrated(), tiny_inputs("qwen2")
    settings = TransferSettings(outputs=0.0, logits=1.0, temperature=2.0)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, 4:6] = labels[1, 9] = labels[1, 0] = 7
    result = transfer_losses(model, {**inputs, "labels": labels}, settings)
    student = logits(model, inputs)
    host = tiny_host("qwen2")
    log_host = (logits(host, inputs) / 2).log_softmax(-1)
    kl = (log_host.exp() * (log_host - (student / 2).log_softmax(-1))).sum(-1)
    expected = 4 * ((kl[0, 3] + kl[0, 4]) / 2 + kl[1, 8]) / 2
    torch.testing.assert_close(result.losses["logits"], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["cross attention", "vit", "bert"])
def test_other_kinds_of_hosts_learn_end_to_end(family):
    model = calibrated(family)
    inputs = tiny_inputs(family)
    if family == "cross attention":
        inputs["attention_mask"][0, 8:] = 0
        inputs["labels"] = inputs.pop("decoder_input_ids")
    settings = TransferSettings(logits=1.0, states=1.0)
    optimizer = torch.optim.Adam(
        [p for m in gravity_modules(model).values() for p in m.parameters()]
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        result = transfer_losses(model, inputs, settings)
        result.total.backward()
        optimizer.step()
        values.append(result.total.item())
    assert min(values[1:]) < values[0]


def test_bfloat16_gives_the_loss_of_float32_within_its_rounding():
    inputs = padded_inputs()
    exact = transfer_losses(calibrated(), inputs, LAYERWISE).total
    model = calibrated().bfloat16()
    for module in gravity_modules(model).values():
        module.float()
    rounded = transfer_losses(model, inputs, LAYERWISE).total
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert math.isclose(rounded.item(), exact.item(), rel_tol=0.1)
    assert all(m.mass_log.grad.isfinite().all() for m in gravity_modules(model).values())


@pytest.mark.parametrize("settings", [LAYERWISE, END_TO_END])
def test_observers_are_gone_after_a_step_and_after_a_failure(settings):
    model, inputs = calibrated(), tiny_inputs("qwen2")
    expected = logits(model, inputs)

    def is_clean():
        observers = [m.observer for m in model.modules() if isinstance(m, GravityParameters)]
        return observers == [None] * 3 and not model._forward_hooks

    transfer_losses(model, inputs, settings)
    assert is_clean()
    hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        transfer_losses(model, inputs, settings)
    hook.remove()
    assert is_clean() and torch.equal(logits(model, inputs), expected)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("finds_unused", [False, True])
@pytest.mark.parametrize("mode", ["layerwise", "end_to_end"])
def test_under_ddp_the_gradients_are_the_same(mode, finds_unused, process_group):
    """DDP reduces what it finds in the forward pass's output, or waits for every parameter."""
    gradients = []
    for wraps in (False, True):
        model = calibrated() if mode == "layerwise" else moved_lora().train()
        inputs, settings = padded_inputs(), TransferSettings(mode=mode, weights=0.5)
        with train_only_gravity(model) if mode == "layerwise" else nullcontext():
            ddp = torch.nn.parallel.DistributedDataParallel(
                model, find_unused_parameters=finds_unused
            )
            for _ in range(2):
                model.zero_grad()
                wrapped = ddp if wraps else model
                transfer_losses(model, inputs, settings, wrapped=wrapped).total.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_an_unpatched_model_is_refused():
    with pytest.raises(RuntimeError, match="expected a patched model, got Qwen2ForCausalLM"):
        transfer_losses(tiny_host("qwen2"), tiny_inputs("qwen2"), END_TO_END)
    with (
        pytest.raises(RuntimeError, match="expected a patched model"),
        train_only_gravity(tiny_host("qwen2")),
    ):
        pass


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mode": "sideways"}, "mode: expected one of"),
        ({"weights": -1.0}, "weights: expected a finite number >= 0"),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0"),
        ({"outputs": 0.0, "loss": 1.0}, "use GravityTrainer"),
        ({"mode": "layerwise", "logits": 1.0}, "Use mode='end_to_end'"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TransferSettings(**wrong)


def test_a_term_that_the_model_or_batch_cannot_give_is_refused():
    model = patch_with_gravity(AutoModel.from_config(tiny_host("bert").config))
    with pytest.raises(ValueError, match="expected a model that returns logits"):
        transfer_losses(model, tiny_inputs("bert"), replace(END_TO_END, logits=1.0))
    with pytest.raises(ValueError, match="expected labels in the batch"):
        transfer_losses(calibrated(), tiny_inputs("qwen2"), replace(END_TO_END, loss=1.0))


def test_layers_that_keep_dot_product_are_not_compared():
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig(layers=[1]))
    result = transfer_losses(model, tiny_inputs("qwen2"), LAYERWISE)
    result.total.backward()
    assert len(gravity_modules(model)) == 1 and result.total > 0
