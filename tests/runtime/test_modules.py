"""Modules are registered, keep their signatures, and come back from their checkpoints."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from runtime.watched import tiny_lgt
from torch import nn

from gravity_hf.runtime import (
    Ledger,
    LGTVictorOSModule,
    MirrorLayer,
    VictorOSBaseModule,
    registered_modules,
    victoros_module,
)


class Ran:
    """Notes that a file ran code."""

    ran = False

    def __reduce__(self) -> tuple:
        return (setattr, (Ran, "ran", True))


def test_an_instance_is_given_what_it_lacks() -> None:
    @victoros_module("gives", "1.0", containment_native=True)
    class Gives:
        """Documented."""

        def __init__(self, size: int, *, rate: float = 0.1) -> None:
            """Of that size."""
            self.size = size

    made = Gives(3)
    assert Gives._victoros_meta.name == "gives"
    assert Gives._victoros_meta.requirements == []
    assert Gives._victoros_meta.containment_native
    assert made.ledger.agent_id == "gives"
    assert isinstance(made.mirror_layer, MirrorLayer)
    assert made.mirror_layer.ledger is made.ledger
    assert list(inspect.signature(Gives).parameters) == ["size", "rate"]
    assert Gives.__init__.__name__ == "__init__"
    assert Gives.__init__.__doc__ == "Of that size."


def test_an_instance_keeps_what_it_made() -> None:
    own = Ledger("mine")

    @victoros_module("keeps", "1.0")
    class Keeps:
        def __init__(self) -> None:
            self.ledger = own

    made = Keeps()
    assert made.ledger is own
    assert made.mirror_layer.ledger is own


def test_a_decorated_subclass_goes_by_its_own_name() -> None:
    @victoros_module("base", "1.0")
    class Base(nn.Module):
        pass

    @victoros_module("derived", "1.0")
    class Derived(Base):
        def __init__(self) -> None:
            super().__init__()
            self.ready = True

    class Plain(Derived):
        def __init__(self) -> None:
            super().__init__()
            assert self.ledger is not None

    assert Derived().ledger.agent_id == "derived"
    assert Base().ledger.agent_id == "base"
    assert Plain().ledger.agent_id == "derived"


def test_registered_modules_are_listed() -> None:
    @victoros_module("listed", "2.0")
    class Listed:
        pass

    found = registered_modules()
    assert found["listed==2.0"] is Listed
    assert found["lgt_core==0.1.0"] is LGTVictorOSModule
    assert list(found) == sorted(found)


def test_a_name_belongs_to_one_class() -> None:
    def make(module: str) -> type:
        return victoros_module("taken", "1.0")(type("Taken", (), {"__module__": module}))

    first = make("one")
    again = make("one")  # as after a reload
    assert registered_modules()["taken==1.0"] is again
    with pytest.raises(ValueError, match="taken 1.0 is one.Taken already"):
        make("two")
    victoros_module("taken", "1.1")(first)
    del first, again
    assert make("two").__module__ == "two"


@pytest.mark.parametrize("wrong", [("", "1.0"), ("name", "")])
def test_a_module_has_a_name_and_a_version(wrong: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="expected a name and a version"):
        victoros_module(*wrong)


@victoros_module("holder", "1.0")
class Holder(VictorOSBaseModule):
    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model


def test_a_base_module_does_nothing_by_itself() -> None:
    assert Holder().now() > 1e9
    with pytest.raises(NotImplementedError, match="Holder.process"):
        Holder().process(1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_brings_back_weights_and_history(tied: bool, tmp_path: Path) -> None:
    saved = Holder(tiny_lgt(tie_word_embeddings=tied))
    saved.ledger.log("event", {"i": 1})
    folder = tmp_path / "some" / "checkpoint"
    saved.save_checkpoint(folder, {"step": 3, "rate": float("inf")})
    saved.save_checkpoint(folder, {"step": 4})
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "victoros.json"}
    assert [file.name for file in folder.parent.iterdir()] == ["checkpoint"]

    other = Holder(tiny_lgt(tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1.0)
    other.ledger.log("later")
    content = other.load_checkpoint(folder)
    assert content["extra"] == {"step": 4}
    assert content["ledger_snapshot"] == saved.ledger.snapshot()
    for name, tensor in saved.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    assert "model_state_dict" in content
    assert [entry.event for entry in other.ledger.entries()] == ["event", "later"]


def test_a_module_without_a_model_has_checkpoints_too(tmp_path: Path) -> None:
    Holder().save_checkpoint(tmp_path / "c")
    assert "model_state_dict" not in Holder().load_checkpoint(tmp_path / "c")


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a new path"):
        Holder().save_checkpoint(tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_file_beside_a_checkpoint_is_not_lost(tmp_path: Path) -> None:
    Holder().save_checkpoint(tmp_path / "c")
    (tmp_path / "c" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        Holder().save_checkpoint(tmp_path / "c")
    assert (tmp_path / "c" / "mine.txt").read_text() == "mine"


def test_a_link_to_a_checkpoint_stays_one(tmp_path: Path) -> None:
    Holder().save_checkpoint(tmp_path / "c", {"step": 1})
    (tmp_path / "link").symlink_to(tmp_path / "c")
    Holder().save_checkpoint(tmp_path / "link", {"step": 2})
    assert (tmp_path / "link").is_symlink()
    assert Holder().load_checkpoint(tmp_path / "c")["extra"] == {"step": 2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("victoros.json", "[1]", "expected an object"),
        ("victoros.json", '{"format": 1}', "expected ledger_snapshot"),
        ("victoros.json", "{nope", "expected JSON"),
        ("victoros.json", "[" * 100_000, "expected JSON"),
        ("model.safetensors", "\0" * 64, "expected safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    Holder(nn.Linear(2, 2)).save_checkpoint(tmp_path / "c")
    (tmp_path / "c" / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Holder(nn.Linear(2, 2)).load_checkpoint(tmp_path / "c")
    assert name in str(error.value)


def test_a_snapshot_that_is_none_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    holder = Holder(nn.Linear(2, 2))
    before = holder.model.weight.clone()
    wrong = _published(nn.Linear(2, 2), Ledger()) | {"ledger_snapshot": {"entries": [{}]}}
    torch.save(wrong, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="snapshot"):
        holder.load_checkpoint(tmp_path / "x.pt")
    torch.save(wrong | {"model_state_dict": {"weight": "text"}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="expected tensors"):
        holder.load_checkpoint(tmp_path / "x.pt")
    assert torch.equal(holder.model.weight, before)


def test_a_class_without_room_for_ledger_and_mirror_is_refused() -> None:
    with pytest.raises(TypeError, match="__slots__"):
        victoros_module("slots", "1.0")(type("Slots", (), {"__slots__": ("x",)}))
    roomy = type("Roomy", (), {"__slots__": ("ledger", "mirror_layer", "__weakref__")})
    assert victoros_module("roomy", "1.0")(roomy)().ledger.agent_id == "roomy"


def test_what_has_no_json_form_is_refused_and_the_older_checkpoint_stays(tmp_path: Path) -> None:
    Holder().save_checkpoint(tmp_path / "c", {"step": 1})
    with pytest.raises(TypeError, match=r"checkpoint\.extra\.x"):
        Holder().save_checkpoint(tmp_path / "c", {"x": object()})
    assert Holder().load_checkpoint(tmp_path / "c")["extra"] == {"step": 1}


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path: Path) -> None:
    Holder(tiny_lgt(num_hidden_layers=1)).save_checkpoint(tmp_path / "c")
    Holder(tiny_lgt(hidden_size=32)).save_checkpoint(tmp_path / "d")
    holder = Holder(tiny_lgt())
    before = {name: x.clone() for name, x in holder.model.state_dict().items()}
    for name, message in (("c", "without"), ("d", "of another shape")):
        with pytest.raises(ValueError, match=f"not of this LGTForCausalLM: {message}"):
            holder.load_checkpoint(tmp_path / name)
    assert all(torch.equal(x, before[name]) for name, x in holder.model.state_dict().items())
    assert len(holder.ledger) == 0


def _published(model: nn.Module, ledger: Ledger, **extra: object) -> dict:
    return {
        "ledger_snapshot": ledger.snapshot(),
        "extra": extra,
        "model_state_dict": model.state_dict(),
    }


def test_a_published_checkpoint_is_read_without_running_it(tmp_path: Path) -> None:
    source, ledger = nn.Linear(2, 2), Ledger("old")
    ledger.log("event")
    torch.save(_published(source, ledger, step=1), tmp_path / "old.pt")
    holder = Holder(nn.Linear(2, 2))
    assert holder.load_checkpoint(tmp_path / "old.pt")["extra"] == {"step": 1}
    assert torch.equal(holder.model.weight, source.weight)
    assert holder.ledger.entries()[0].event == "event"

    torch.save(_published(source, ledger, code=Ran()), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="It was not run"):
        holder.load_checkpoint(tmp_path / "bad.pt")
    assert not Ran.ran


@pytest.mark.parametrize("content", [{"x": 1}, [1]])
def test_another_file_is_no_checkpoint(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="expected ledger_snapshot"):
        Holder().load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="expected a folder"):
        Holder().load_checkpoint(tmp_path / "nothing")


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    Holder().save_checkpoint(tmp_path / "c")
    file = tmp_path / "c" / "victoros.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="expected format 1, got 2"):
        Holder().load_checkpoint(tmp_path / "c")
