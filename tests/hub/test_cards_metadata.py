"""The metadata of a card: licence and sources are the host's, results can be read back, the Hub
takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub.card_results import HOST_CARD, RESULTS, results, section, table, upload
from hub.loopback import WRITER, LoopbackHub
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from gravity_hf.hub.card_host import read_host_card
from gravity_hf.hub.cards import card_of_folder, model_card

FULL = """---
license: other
license_name: research-only
license_link: https://example.org/licence
language: no
base_model: [maker/older]
datasets: maker/words
---
# Host

```python
print("@not a citation")
```

```bibtex
@misc{host,
  title = {A host}
}
```
"""


def with_host(**changes: Any) -> dict[str, Any]:
    return results(host={**RESULTS["host"], **changes})


def reread(results: dict[str, Any]) -> ModelCard:
    return ModelCard(str(model_card(results, "me/out")))


def test_what_was_saved_is_the_result_and_reads_back_the_same() -> None:
    card = reread(results())
    assert card.data.to_dict()["model-index"][0]["name"] == "me/out"
    name, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "me/out" and found == model_card(results(), "me/out").data.eval_results
    values = {result.metric_args["row"]: result.metric_value for result in found}
    # The host, the control and the stages before are other models: they stand in the table.
    assert values == {"healed": 2.4125}
    assert table(section(card, "What was measured"))[1][1] == "2.5000"
    assert all(result.dataset_args["length"] == 256 for result in found)


def test_a_result_of_gravity_says_how_gravitational_it_was() -> None:
    found = {r.metric_args["row"]: r.metric_args for r in reread(results()).data.eval_results}
    assert (
        found["healed"]["contrast_median"] == 1.86 and found["healed"]["softness_median"] == 0.987
    )


def test_the_licence_is_the_hosts() -> None:
    card = reread(results())
    assert card.data.license == "apache-2.0"
    assert "`apache-2.0`, inherited" in section(card, "Licence and sources")
    other = {**HOST_CARD, "license": "other", "license_name": "mine", "license_link": "https://a.b"}
    card = reread(with_host(card=other))
    assert (card.data.license_name, card.data.license_link) == ("mine", "https://a.b")
    assert "`other` (mine), https://a.b" in card.text


@pytest.mark.parametrize(
    ("host_card", "said"),
    [
        ({**HOST_CARD, "license": None}, "Licence: not stated by the host."),
        ({**HOST_CARD, "license": None, "found": False}, "no card of the host was found"),
        (None, "no card of the host was found"),
    ],
)
def test_a_licence_that_is_not_known_is_not_claimed(host_card: Any, said: str) -> None:
    card = reread(with_host(card=host_card))
    assert said in section(card, "Licence and sources")
    assert "license" not in card.data.to_dict()


def test_sources_and_languages_are_the_hosts() -> None:
    card = reread(results())
    assert card.data.base_model == "maker/host" and card.data.pipeline_tag == "text-generation"
    assert card.data.language == ["en"] and card.data.datasets == ["maker/words"]
    text = section(card, "Licence and sources")
    assert "`maker/host`" in text and "`maker/older`" in text and "`maker/words`" in text
    assert card.data.tags == ["gravity-attention", "gravity-force"]


def test_a_folder_is_no_name_on_the_hub_and_its_place_is_nobodys_business(tmp_path: Path) -> None:
    folder = tmp_path / "my-host"
    folder.mkdir()
    local = with_host(name=str(folder), local=True, writes=False)
    card = reread(local)
    assert card.data.base_model is None and card.data.pipeline_tag is None
    assert "`my-host`" in card.text and str(tmp_path) not in card.text
    card = reread(with_host(name=str(folder), local=True, base_model="maker/host"))
    assert card.data.base_model == "maker/host" and "(`maker/host` on the Hub)" in card.text


def test_an_adapter_is_not_offered_to_plain_peft() -> None:
    card = reread(results(saved="adapter"))
    assert card.data.library_name == "gravity_hf" and "lora" in card.data.tags


def test_the_software_and_the_host_are_cited() -> None:
    text = section(reread(results()), "Citation")
    assert text.count("```bibtex") == 2
    assert "@software{gravity_hf" in text and "version = {0.1.0}" in text
    assert HOST_CARD["citation"] in text and "author" not in text
    alone = reread(with_host(card={**HOST_CARD, "citation": None}))
    assert section(alone, "Citation").count("```bibtex") == 1


def test_the_hosts_card_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(FULL)
    found = read_host_card(str(tmp_path))
    assert found == {
        "found": True,
        "broken": False,
        "license": "other",
        "license_name": "research-only",
        "license_link": "https://example.org/licence",
        "language": ["no"],
        "base_model": ["maker/older"],
        "datasets": ["maker/words"],
        "citation": "@misc{host,\n  title = {A host}\n}",
    }


@pytest.mark.parametrize("text", [None, "---\nlicense: [\n---\n", "---\n- a\n---\n", "\0\udcff"])
def test_a_missing_or_broken_card_of_the_host_is_no_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode("utf-8", "surrogateescape"))
    found = read_host_card(str(tmp_path))
    assert not found["found"] and found["license"] is None


def test_the_hosts_card_is_read_from_the_hub_where_that_may_be_asked(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    api = HfApi(endpoint=hub.url, token=WRITER)
    api.create_repo("me/host")
    content = FULL.replace("language: no", "language: en").encode()
    api.upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id="me/host")
    asked = len(hub.requests)
    assert not read_host_card("me/host", online=False)["found"] and len(hub.requests) == asked
    assert read_host_card("me/host")["license_name"] == "research-only"
    assert read_host_card("me/host", online=False)["license_name"] == "research-only"
    assert not read_host_card("me/there-is-none")["found"]


def test_a_base_is_claimed_where_it_has_a_card_on_the_hub_or_a_run_knew_it(
    hub: LoopbackHub, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative folder has the form of a name on the Hub: `runs/host` may be either."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    api = HfApi(endpoint=hub.url, token=WRITER)
    api.create_repo("me/base")
    api.upload_file(path_or_fileobj=b"# Base\n", path_in_repo="README.md", repo_id="me/base")
    assert card_of_folder(export, "x", host="me/base").data.base_model == "me/base"
    assert card_of_folder(export, "x", host="runs/host").data.base_model is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "base").mkdir(parents=True)
    assert card_of_folder(export, "x", host="me/base").data.base_model is None


def test_the_hub_takes_the_metadata(hub: LoopbackHub) -> None:
    for content in (results(), results(saved="adapter"), with_host(card=None)):
        upload(model_card(content, "me/out"), hub)
    assert hub.count("validate-yaml") == 3
    broken = model_card(results(), "me/out")
    broken.data.license = {"not": "a name"}
    with pytest.raises(ValueError, match="license"):
        upload(broken, hub)
