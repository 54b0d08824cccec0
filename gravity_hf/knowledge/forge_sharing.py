"""Work of several processes, whose outcome does not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .errors import KnowledgeError

T = TypeVar("T")


class Sharing:
    """Splits a list of independent pieces of work over the processes of an accelerator.

    Every process gets every result, in the order of the work, and goes on with the same.

    Args:
        accelerator: of `accelerate`, or None for this process alone.
    """

    def __init__(self, accelerator: Any = None) -> None:
        self._accelerator = accelerator

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self._accelerator is None or bool(self._accelerator.is_main_process)

    def map(self, work: Callable[[int], T], count: int) -> list[T]:
        """`[work(0), ..., work(count - 1)]`, each done by one process.

        Raises:
            KnowledgeError: an error in another process, which stops all of them: nobody waits for
                one that will not come. An error of this process is raised as it is.
        """
        if self._accelerator is None or self._accelerator.num_processes == 1:
            return [work(i) for i in range(count)]
        with self._accelerator.split_between_processes(list(range(count))) as own:
            done, error = _tried(work, own)
        everything = self._gathered([*done, (-1, error and f"{type(error).__name__}: {error}")])
        if error is not None:
            raise error
        results = {i: result for i, result in everything if i >= 0}
        problems = [text for i, text in everything if i < 0 and text]
        if problems:
            raise KnowledgeError(f"forge: another process failed, with {problems[0]}")
        return [results[i] for i in range(count)]

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, in every process. Raises as `map`."""
        return self.map(lambda _: make(), 1)[0]

    def _gathered(self, items: list[Any]) -> list[Any]:
        """The items of all processes; pickled between them by torch.distributed, as those of one
        program: nothing of it comes from a file."""
        if hasattr(self._accelerator, "gather_object"):
            return list(self._accelerator.gather_object(items))
        from accelerate.utils import gather_object

        return list(gather_object(items))


def _tried(
    work: Callable[[int], Any], own: Sequence[int]
) -> tuple[list[tuple[int, Any]], Exception | None]:
    done: list[tuple[int, Any]] = []
    try:
        for i in own:
            done.append((i, work(i)))
    except Exception as error:  # told to the others first, then raised
        return [], error
    return done, None
