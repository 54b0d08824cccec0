"""GeolipTrainer: what it evaluates, its rates, its curves, and a resume bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from training.geolip_training_cases import WIDTH, ragged_rows, small_geolip, small_trainer
from transformers import TrainerCallback

from gravity_hf.models.geolip.collating import GeolipCollator
from gravity_hf.models.geolip.frames import frame_deviation
from gravity_hf.training.geolip.history import DeviationHistory
from gravity_hf.training.recipe import train_resumably


class Stop(TrainerCallback):
    """The power fails after a step, once what belongs to it is saved."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def watched():
    return DeviationHistory(GeolipCollator()(ragged_rows(3, seed=2)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 6 steps on noisy rows, and its deviations."""
    deviations = watched()
    trainer = small_trainer(tmp_path_factory.mktemp("run"), callbacks=[deviations], denoise=0.5)
    train_resumably(trainer)
    return trainer, deviations


def test_an_evaluation_has_the_means_over_all_valid_tokens(trained):
    trainer, _ = trained
    metrics = trainer.evaluate()
    batch = GeolipCollator()(ragged_rows(7, seed=1))
    with torch.no_grad():
        outputs = trainer.model.eval()(**batch)
    assert metrics["eval_loss"] > 0
    for name in ("recon_cosine", "frame_deviation"):
        assert metrics[f"eval_{name}"] == pytest.approx(outputs[name].item(), abs=1e-6)


def test_own_metrics_replace_ours(tmp_path):
    trainer = small_trainer(tmp_path)
    assert "eval_recon_cosine" in trainer.evaluate()
    own = type(trainer)(
        model=trainer.model,
        args=trainer.args,
        eval_dataset=trainer.eval_dataset,
        compute_metrics=lambda prediction: {"shape": prediction.predictions.shape[-1]},
    )
    metrics = own.evaluate()
    assert metrics["eval_shape"] == 6 and "eval_recon_cosine" not in metrics


def test_predictions_are_reconstructions(trained):
    trainer, _ = trained
    predicted = trainer.predict(ragged_rows(2))
    assert predicted.predictions.shape == (2, 3, WIDTH) == predicted.label_ids.shape


def test_other_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match="GeolipModel"):
        small_trainer(tmp_path, model=torch.nn.Linear(2, 2))


def test_alphas_learn_at_their_own_rate(tmp_path):
    model = small_geolip(alpha_lr_multiplier=7.0)
    optimizer = small_trainer(tmp_path, model=model).create_optimizer()
    (alphas,) = (g for g in optimizer.param_groups if g["lr"] == pytest.approx(7e-2))
    assert len(alphas["params"]) == 1 and alphas["params"][0].shape == (4,)
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    counted = sum(len(group["params"]) for group in optimizer.param_groups)
    assert counted == len(list(model.parameters()))


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.1}, {"denoise": -1.0}])
def test_decay_and_negative_noise_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="GeolipTrainer"):
        small_trainer(tmp_path, **wrong)


def test_alphas_and_deviations_are_kept_from_the_first_step_to_the_last(trained, tmp_path):
    trainer, deviations = trained
    history = trainer.alpha_history
    assert history.steps == deviations.steps == [0, 2, 4, 6]
    tensors = load_file(history.save(tmp_path))
    assert tensors["alphas"].shape == (4, 1, 4)
    torch.testing.assert_close(tensors["alphas"][0], torch.full((1, 4), 0.0238406))
    assert torch.equal(tensors["alphas"][-1], trainer.model.alphas())
    frame = trainer.model.encode(deviations.batch["patches"])
    expected = frame_deviation(frame)[deviations.batch["attention_mask"].bool()]
    said = json.loads(deviations.save(tmp_path).read_text())
    assert said["mean"][-1] == pytest.approx(expected.mean().item())
    assert said["absmax"][-1] == pytest.approx(expected.abs().max().item())
    assert said["inside"][-1] == pytest.approx((expected.abs() < 0.04).double().mean().item())


def test_curves_get_alphas_and_deviations(trained):
    trainer, deviations = trained
    entry = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert entry["mean_alpha"] == pytest.approx(trainer.model.alphas().mean().item())
    assert entry["frame_deviation_mean"] == deviations.entries[-1]["mean"]


def test_a_resumed_run_is_the_one_that_was_never_stopped(trained, tmp_path):
    whole, deviations = trained
    with pytest.raises(KeyboardInterrupt):
        train_resumably(small_trainer(tmp_path, callbacks=[watched(), Stop(5)], denoise=0.5))
    again = watched()
    resumed = small_trainer(tmp_path, callbacks=[again], denoise=0.5)
    losses = train_resumably(resumed)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert [e["loss"] for e in losses] == [
        e["loss"] for e in whole.state.log_history if "loss" in e
    ]
    assert again.state() == deviations.state()
    assert resumed.alpha_history.state() == whole.alpha_history.state()


def test_training_noise_differs_from_step_to_step(trained):
    trainer, _ = trained
    draws = [torch.randn(3, generator=trainer._noise()) for _ in range(2)]
    assert not torch.equal(*draws)
