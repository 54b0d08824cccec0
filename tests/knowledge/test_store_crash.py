"""Processes that are killed in the middle of a change, and many that write at once.

Children are forked, so that each starts with the store in memory.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback

import pytest

from gravity_hf.knowledge import store_files
from gravity_hf.knowledge.errors import LockTimeoutError
from gravity_hf.knowledge.store import BeliefStore

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def in_child(action):
    """Run `action` in a child process; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child):
    """The exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(step):
    """Let this process be killed before its `step`-th step towards the disk, counted from 1. To
    write a file is two steps, half of it each."""
    taken = []

    def count():
        taken.append(None)
        if len(taken) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function):
        def call(*args, **kwargs):
            count()
            return function(*args, **kwargs)

        return call

    class Halved:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            count()
            self.file.write(data[len(data) // 2 :])

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

    opened = store_files.Path.open
    for name in ("fsync", "replace"):
        setattr(store_files.os, name, watched(getattr(os, name)))
    store_files.Path.unlink = watched(store_files.Path.unlink)
    store_files.Path.open = lambda *args, **kwargs: Halved(opened(*args, **kwargs))


def killed_everywhere(store, change):
    """`change` in children that are killed one step later each time, until one gets through; after
    each, what the store is like on disk: its keys in force."""
    states = []
    for step in range(1, 60):

        def action(step=step):
            kill_at(step)
            change()

        code = ended(in_child(action))
        again = BeliefStore.open(store.path, store.model, lock_timeout=5)
        again.verify()
        states.append(again.keys())
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            return states
    raise AssertionError("the change takes more steps than were tried")


def test_a_kill_at_any_step_leaves_the_old_state_or_the_new(tmp_path, llama, random_delta):
    store = BeliefStore.create(tmp_path / "kb", llama)
    store.add_delta("old", random_delta(llama, 0))
    new = random_delta(llama, 1)

    def change():
        current = BeliefStore.open(store.path, llama)
        with current.transaction():
            if "new" not in current:
                current.add_delta("new", new)
                current.remove("old")

    states = killed_everywhere(store, change)
    assert states[0] == ["old"] and states[-1] == ["new"]
    assert all(state in (["old"], ["new"]) for state in states)
    # Killed between writing and renaming both files, each before and after.
    assert states.count(["old"]) >= 6
    # What the killed ones left behind is in nobody's way.
    store.reload()
    store.add_delta("newer", random_delta(llama, 2))
    assert store.rollback("old", 1).version == 2


def test_a_kill_while_purging_is_made_good_by_the_next_change(tmp_path, llama, random_delta):
    store = BeliefStore.create(tmp_path / "kb", llama)
    file = (
        store.path / "deltas" / f"{store.add_delta('a', random_delta(llama, 0)).id}-v1.safetensors"
    )

    def change():
        unlink = store_files.Path.unlink

        def killed(path, **options):
            if path == file:
                os.kill(os.getpid(), signal.SIGKILL)
            unlink(path, **options)

        store_files.Path.unlink = killed
        store.remove("a", purge=True)

    assert ended(in_child(change)) == -signal.SIGKILL
    assert file.exists()
    again = BeliefStore.open(store.path, llama)
    assert again.keys() == []
    again.add_delta("b", random_delta(llama, 1))
    assert not file.exists()


def test_processes_that_add_at_once_lose_nothing(tmp_path, llama, random_delta):
    store = BeliefStore.create(tmp_path / "kb", llama)
    deltas = [random_delta(llama, seed) for seed in range(8)]

    def adding(number):
        own = BeliefStore.open(store.path, llama)
        for i in range(6):
            own.add_delta(f"k/{number}/{i}", deltas[number])
            # All write this one in turn: each a version more.
            with own.transaction():
                own.update_delta("shared", deltas[number])

    store.add_delta("shared", deltas[0])
    children = [in_child(lambda number=number: adding(number)) for number in range(8)]
    assert [ended(child) for child in children] == [0] * 8
    store.reload()
    assert len(store) == 49 and store.revision == 1 + 8 * 12
    assert [v.version for v in store.history("shared")] == list(range(1, 50))
    assert store.verify().files == 48 + 49


def test_one_key_added_by_many_is_added_once(tmp_path, llama, random_delta):
    store = BeliefStore.create(tmp_path / "kb", llama)
    delta = random_delta(llama, 0)
    children = [in_child(lambda: store.add_delta("a", delta)) for _ in range(4)]
    assert sorted(ended(child) for child in children) == [0, 1, 1, 1]
    store.reload()
    assert len(store.history("a")) == 1


def test_a_lock_that_is_held_times_out_with_a_plain_error(tmp_path, llama, random_delta):
    store = BeliefStore.create(tmp_path / "kb", llama, lock_timeout=0.1)
    delta = random_delta(llama, 0)

    def blocked():
        with pytest.raises(LockTimeoutError, match=r"within 0.1 s.*another thread or process"):
            store.add_delta("a", delta)

    # A child has the parent's memory, but not its hold on the file.
    own = BeliefStore.open(store.path, llama, lock_timeout=0.1)
    with store.transaction():
        with pytest.raises(LockTimeoutError):
            own.add_delta("a", delta)
        assert own.keys() == []
    own.add_delta("a", delta)
    ready, done = os.pipe(), os.pipe()

    def holding():
        with BeliefStore.open(store.path, llama).transaction():
            os.write(ready[1], b"x")
            os.read(done[0], 1)

    child = in_child(holding)
    os.read(ready[0], 1)
    blocked()
    os.write(done[1], b"x")
    assert ended(child) == 0
