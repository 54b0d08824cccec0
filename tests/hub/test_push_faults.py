"""Whatever goes wrong, a push is tried again or says why not, and no half model is ever there."""

from __future__ import annotations

import logging
import shutil
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from ecosystem.folders import byte_decoder
from hub.conftest import Waits
from hub.loopback import READER, LoopbackHub
from hub.loopback_faults import Fault
from huggingface_hub import CommitInfo, HfApi

from gravity_hf import push_gravity_model
from gravity_hf.hub import retry
from gravity_hf.hub.repository import open_repository
from gravity_hf.training.files import write_text

COMMIT = "POST /api/models/me/x/commit/"
PUT = "PUT /large/"
ALWAYS = 99
# Far enough that the time which the tests before this one take is lost in it.
IN_A_DAY = formatdate(time.time() + 86_400, usegmt=True)


def push(folder: Path, **options) -> CommitInfo:
    return push_gravity_model(folder, "me/x", figures=False, **options)


def is_whole(hub: LoopbackHub, revision: str = "main") -> bool:
    """Every file is there that a loader needs, or none of them."""
    paths = hub.repo("me/x").paths(revision)
    assert {"config.json", "model.safetensors", "modeling_gravity.py", "README.md"} <= paths
    return len(hub.repo("me/x").messages) == 2


def is_untouched(hub: LoopbackHub) -> bool:
    return "me/x" not in hub.store.repos or (
        hub.repo("me/x").paths() == set() and len(hub.repo("me/x").refs) == 1
    )


PASSING = {
    "500 twice when it is created": Fault("POST /api/repos/create", status=500, times=2),
    "503 when the branch is read": Fault("GET /api/models/me/x$", status=503),
    "500 twice when it is listed": Fault("GET /api/models/me/x/tree", status=500, times=2),
    "500 twice before the upload": Fault("POST .*/preupload/", status=500, times=2),
    "500 twice in the upload": Fault(PUT, status=500, times=2),
    "cut in mid-upload": Fault(PUT, cut_after=50_000),
    "cut before the upload": Fault("POST .*/objects/batch", cut_after=10),
    "500 twice at the commit": Fault(COMMIT, status=500, times=2),
    "cut in the commit": Fault(COMMIT, cut_after=1000),
    "500 though it was committed": Fault(COMMIT, status=500, done=True),
    "cut though it was committed": Fault(COMMIT, done=True),
    "429 at the commit": Fault(COMMIT, status=429, headers={"Retry-After": "7"}),
    "429 in the upload": Fault(PUT, status=429, headers={"Retry-After": "7"}),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_a_passing_fault_ends_in_one_whole_commit(
    fault: Fault, hub: LoopbackHub, waits: Waits, export: Path
) -> None:
    fault.seen = 0
    hub.faults = [fault]
    done = push(export)
    assert fault.seen > fault.times or fault.done
    assert is_whole(hub) and done.oid == hub.repo("me/x").oid("main")
    if fault.status == 429:
        assert max(waits.seconds) >= 7


LASTING = {
    "409": (Fault(COMMIT, status=409, times=ALWAYS), RuntimeError, "somebody has committed"),
    "401": (Fault("POST ", status=401, times=ALWAYS), PermissionError, "hf auth login"),
    "403": (Fault(COMMIT, status=403, times=ALWAYS), PermissionError, "may write"),
    "500": (Fault("POST ", status=500, times=ALWAYS), ConnectionError, "push again later"),
    "500 in the upload": (Fault(PUT, status=500, times=ALWAYS), ConnectionError, "not sent again"),
    "500 at the commit": (
        Fault(COMMIT, status=500, times=ALWAYS),
        ConnectionError,
        "answered 500.*Nothing was changed",
    ),
    "cut in the upload": (Fault(PUT, times=ALWAYS, cut_after=9), ConnectionError, "was cut"),
    "cut at the commit": (Fault(COMMIT, times=ALWAYS), ConnectionError, "was cut"),
    "429": (
        Fault(COMMIT, status=429, times=ALWAYS, headers={"Retry-After": "3600"}),
        ConnectionError,
        "wait 3600 s",
    ),
    "429 in a window": (
        Fault(COMMIT, status=429, times=ALWAYS, headers={"RateLimit": '"api";r=0;t=900'}),
        ConnectionError,
        "wait 900 s",
    ),
    "429 until a date": (
        Fault(COMMIT, status=429, times=ALWAYS, headers={"Retry-After": IN_A_DAY}),
        ConnectionError,
        r"wait 8\d{4} s",
    ),
    "429 without a time": (Fault(COMMIT, status=429, times=ALWAYS), ConnectionError, "slow down"),
}


@pytest.mark.parametrize(("fault", "error", "words"), LASTING.values(), ids=LASTING.keys())
def test_a_lasting_fault_is_said_plainly_and_changes_nothing(
    fault: Fault,
    error: type[Exception],
    words: str,
    hub: LoopbackHub,
    waits: Waits,
    export: Path,
) -> None:
    fault.seen = 0
    hub.faults = [fault]
    with pytest.raises(error, match=words):
        push(export)
    assert is_untouched(hub)
    assert sum(waits.seconds) < 60


@pytest.mark.parametrize("fault", ["500 at the commit", "409", "429"])
def test_a_branch_made_for_nothing_goes_again(
    fault: str, hub: LoopbackHub, waits: Waits, export: Path
) -> None:
    hub.faults = [LASTING[fault][0]]
    hub.faults[0].seen = 0
    with pytest.raises(LASTING[fault][1]):
        push(export, revision="soft")
    assert is_untouched(hub) and hub.count("POST .*/branch/soft") == 1
    hub.faults = []
    push(export, revision="soft")
    assert is_whole(hub, "soft")


def test_a_branch_that_was_there_stays(hub: LoopbackHub, waits: Waits, export: Path) -> None:
    push(export, revision="soft")
    before = hub.repo("me/x").oid("soft")
    hub.faults = [Fault(COMMIT, status=500, times=ALWAYS)]
    with pytest.raises(ConnectionError):
        push(export, revision="soft", tags=["more"])
    assert hub.repo("me/x").oid("soft") == before


def test_a_new_branch_that_somebody_has_pushed_to_is_not_deleted(
    hub: LoopbackHub, waits: Waits, export: Path
) -> None:
    push(export)
    repository = open_repository(HfApi(), "me/x", private=None, token=None)
    start = repository.head(None)
    repository.create_branch("soft", start)
    push(export, revision="soft", tags=["theirs"])
    theirs = hub.repo("me/x").oid("soft")
    repository.drop_branch("soft", start)
    assert hub.repo("me/x").oid("soft") == theirs != start


def test_waiting_is_announced_and_grows(
    hub: LoopbackHub, waits: Waits, export: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults = [Fault(COMMIT, status=502, times=3)]
    with caplog.at_level(logging.WARNING, logger=retry.__name__):
        push(export)
    assert waits.seconds == [1, 2, 4]
    assert "committing to me/x: the Hub answered 502; trying again in 1 s" in caplog.text


def test_a_commit_in_between_is_not_overwritten(hub: LoopbackHub, export: Path) -> None:
    hub.store.create("me/x", private=False)
    repo = hub.repo("me/x")
    commit = repo.commit

    def second(*arguments):
        # Somebody else is faster, once.
        repo.commit = commit
        header = {"key": "header", "value": {"summary": "theirs"}}
        file = {"key": "file", "value": {"path": "theirs.md", "content": b"theirs"}}
        commit("main", [header, file], create_pr=False)
        return commit(*arguments)

    repo.commit = second
    with pytest.raises(RuntimeError, match="somebody has committed"):
        push(export)
    assert repo.paths() == {"theirs.md"}
    push(export)
    assert "theirs.md" in repo.paths() and "model.safetensors" in repo.paths()


def test_a_commit_over_a_fault_is_not_taken_for_ours(
    hub: LoopbackHub, waits: Waits, export: Path
) -> None:
    """The head has moved, but not to what we have sent."""
    hub.store.create("me/x", private=False)
    repo = hub.repo("me/x")
    hub.faults = [Fault(COMMIT, status=500)]
    header = {"key": "header", "value": {"summary": "theirs"}}
    waits.seconds = _Doing(lambda: repo.commit("main", [header], create_pr=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry.time, "sleep", waits.seconds.append)
        with pytest.raises(RuntimeError, match="somebody has committed"):
            push(export)
    assert repo.paths() == set()


class _Doing(list):
    """A list that does something when it is added to."""

    def __init__(self, action) -> None:
        super().__init__()
        self.action = action

    def append(self, value) -> None:
        super().append(value)
        self.action()


def test_a_lost_answer_opens_no_second_pull_request(
    hub: LoopbackHub, waits: Waits, export: Path
) -> None:
    hub.faults = [Fault(COMMIT, status=500, done=True)]
    done = push(export, create_pr=True)
    assert done.pr_num == 1 and hub.count(COMMIT) == 1
    assert is_whole(hub, "refs/pr/1")
    assert [ref for ref in hub.repo("me/x").refs if ref.startswith("refs/pr/")] == ["refs/pr/1"]


def test_a_lost_answer_that_cannot_be_looked_up_is_not_called_a_failure(
    hub: LoopbackHub, waits: Waits, export: Path
) -> None:
    hub.faults = [Fault(COMMIT, done=True), Fault("GET ", skip=2, times=ALWAYS)]
    with pytest.raises(ConnectionError, match="whether the commit was made cannot be seen"):
        push(export)
    hub.faults = []
    push(export)
    assert is_whole(hub)


def test_an_interrupted_push_sends_only_what_is_missing(
    hub: LoopbackHub, waits: Waits, tmp_path: Path
) -> None:
    byte_decoder().save_pretrained(tmp_path / "m", max_shard_size="60KB")
    shards = len(list((tmp_path / "m").glob("*.safetensors")))
    hub.faults = [Fault(PUT, status=400, skip=2)]
    with pytest.raises(RuntimeError, match="model-00003"):
        push(tmp_path / "m")
    assert is_untouched(hub) and hub.count(PUT) == 3
    hub.requests.clear()
    push(tmp_path / "m")
    assert shards > 3 and hub.count(PUT) == shards - 2
    hub.requests.clear()
    assert push(tmp_path / "m").oid == hub.repo("me/x").oid("main")
    assert hub.count(PUT) == 0


def test_a_token_that_only_reads_changes_nothing(
    hub: LoopbackHub, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.create("me/x", private=False)
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(PermissionError, match="403"):
        push(export)
    assert is_untouched(hub)


def test_a_public_repository_does_not_get_what_was_to_be_private(
    hub: LoopbackHub, export: Path
) -> None:
    hub.store.create("me/x", private=False)
    with pytest.raises(ValueError, match="there and public"):
        push(export, private=True)
    assert is_untouched(hub) and hub.count(PUT) == 0


def test_metadata_that_the_hub_refuses_changes_nothing(
    hub: LoopbackHub, export: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "model"))
    card = "---\ntags: [gravity-attention]\nlicense: 3\n---\nmine\n"
    write_text(folder / "README.md", card)
    with pytest.raises(ValueError, match="license"):
        push(folder)
    assert is_untouched(hub)


def test_without_a_network_the_error_is_one_line(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        push(export)
