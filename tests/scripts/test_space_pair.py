"""Behind the Space's page: a host that stays itself, and twins that nobody can change."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hosts import tiny_host
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from transformers import PreTrainedModel

from gravity_hf import GravityConfig, gravity_status, patch_with_gravity
from gravity_hf.training.tokenizers import byte_tokenizer

SPACE = Path(__file__).resolve().parents[2] / "scripts" / "space"
PROMPT, OTHER = "What falls?", "An apple."


@pytest.fixture(scope="module")
def space() -> Iterator[SimpleNamespace]:
    """The Space's own modules, as they find each other in its folder."""
    sys.path.insert(0, str(SPACE))
    try:
        import answers
        import pair

        yield SimpleNamespace(answers=answers, pair=pair)
    finally:
        sys.path.remove(str(SPACE))
        for name in ("answers", "pair"):
            sys.modules.pop(name, None)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    host = tiny_host("qwen2", num_hidden_layers=2, vocab_size=256)
    return saved(host, tmp_path_factory.mktemp("host") / "model")


@pytest.fixture(scope="module")
def pair(space: SimpleNamespace, folder: Path):
    return space.pair.Pair("small", folder)


def numbers(answer) -> tuple:
    return answer.host, answer.gravity, answer.likeness, answer.contrast, answer.kl


def test_the_host_stays_the_host_and_lends_its_weights(space, pair) -> None:
    inputs = pair.inputs(PROMPT)
    with torch.no_grad():
        before = pair.host(**inputs).logits
    twins = [
        pair.twin(space.pair.Dial(softness, law))
        for softness, law in itertools.product((0.0, 64.0), ("force", "power"))
    ]
    with torch.no_grad():
        assert pair.host(**inputs).logits.equal(before)
        outputs = [twin.model(**inputs).logits for twin in twins]
    assert not gravity_status(pair.host).patched
    weights = dict(pair.host.named_parameters())
    for twin in twins:
        theirs = {n: p for n, p in twin.model.named_parameters() if ".gravity." not in n}
        assert all(theirs[name] is weight for name, weight in weights.items())
    assert all(not a.equal(b) for a, b in itertools.combinations([before, *outputs], 2))


def test_visitors_at_once_get_what_each_would_get_alone(space, pair, folder, monkeypatch) -> None:
    turns = ((0.0, "force"), (1.0, "power"), (64.0, "force"))
    dials = [space.pair.Dial(*turn) for turn in turns]
    alone = [numbers(space.answers.answer(pair, PROMPT, OTHER, dial)) for dial in dials]
    assert len({answer[2] for answer in alone}) == len(dials)
    made: list[float] = []

    def counted(model, batches, softness, *arguments, **options):
        made.append(softness)
        return calibrate(model, batches, softness, *arguments, **options)

    calibrate = space.pair.calibrate
    monkeypatch.setattr(space.pair, "calibrate", counted)
    crowded = space.pair.Pair("small", folder)

    def visit(dial) -> tuple:
        return numbers(space.answers.answer(crowded, PROMPT, OTHER, dial))

    with ThreadPoolExecutor(6) as visitors:
        together = list(visitors.map(visit, dials * 2))
    assert together == alone * 2
    # A twin for every position of the dial, however many press at once.
    assert len(made) == len(dials)


def test_an_encoder_compares_sentences(space, tmp_path: Path) -> None:
    host = tiny_host("bert", num_hidden_layers=2, vocab_size=256)
    pair = space.pair.Pair("encoder", saved(host.bert, tmp_path / "encoder"))
    answer = space.answers.answer(pair, PROMPT, PROMPT, space.pair.Dial(16.0))
    for side in (answer.host, answer.gravity):
        assert side.text is None
        assert side.bars[0] == (PROMPT, pytest.approx(1.0))
        assert len(side.bars) == 1 + len(space.answers.SENTENCES)
    layers, heads, tokens = 2, 6, len(PROMPT)
    assert answer.maps.host.shape == (layers, heads, tokens, tokens)
    assert answer.maps.contrast.shape == answer.maps.kl.shape == (layers, heads)
    with pytest.raises(space.pair.Unanswerable, match="second sentence is empty"):
        space.answers.answer(pair, PROMPT, " ", space.pair.Dial())


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nothing", "without config.json"),
        ("gravity", "got gravity_qwen2"),
        ("encoder-decoder", "encoder-decoder bart"),
        ("part linear", "one attention module per layer"),
    ],
)
def test_a_folder_that_cannot_be_shown_is_refused(space, tmp_path: Path, kind, says) -> None:
    hosts = {"encoder-decoder": "cross attention", "part linear": "linear attention between"}
    if kind == "gravity":
        patch_with_gravity(tiny_host("qwen2"), GravityConfig()).save_pretrained(tmp_path)
    elif kind in hosts:
        saved(tiny_host(hosts[kind]), tmp_path)
    with pytest.raises(ValueError, match=says):
        space.pair.Pair("refused", tmp_path)


def test_a_dial_has_only_its_positions(space) -> None:
    for wrong in ({"softness": 3.0}, {"law": "coulomb"}, {"distance": "far"}):
        with pytest.raises(space.pair.Unanswerable, match=f"{next(iter(wrong))}: expected one of"):
            space.pair.Dial(**wrong)


def test_the_folder_is_a_space() -> None:
    card = SpaceCard.load(SPACE / "README.md")
    assert (card.data.sdk, card.data.license) == ("gradio", "mit")
    assert (SPACE / card.data.app_file).is_file()
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needed = {r.name: r for r in map(Requirement, (x for x in lines if not x.startswith("-")))}
    assert needed["gravity_hf"].extras == {"space"}
    extras = (SPACE.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    (gradio,) = re.findall(r'"(gradio[^"]+)"', extras)
    assert card.data.sdk_version in Requirement(gradio).specifier
