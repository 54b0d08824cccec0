"""What cache layers share that hold old tokens as codes and the newest as they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class PackedLayer(DynamicLayer):
    """A DynamicLayer of the newest tokens, with codes of those before them."""

    keys: Tensor | None
    values: Tensor | None

    @property
    @abstractmethod
    def packed_length(self) -> int:
        """Tokens that lie in codes."""

    @property
    @abstractmethod
    def packed(self) -> list[Tensor]:
        """The tensors of the codes."""

    @abstractmethod
    def turns(self) -> list[Tensor]:
        """The matrices that keys and values are turned by; layers share them."""

    @abstractmethod
    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """`change` everything that has a row for each sequence; rows are the first dimension."""

    def get_seq_length(self) -> int:
        return self.packed_length + super().get_seq_length()

    def reset(self) -> None:
        # Not `super().reset()`: some versions of it leave zeros behind, as long as what was there.
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def offload(self) -> None:
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.keys is not None and self.keys.device != self.device:
            self._each(lambda x: x.to(self.device, non_blocking=True))

    def tensors(self) -> list[Tensor]:
        """Everything that is held, the turning matrices with it."""
        plain = [x for x in (self.keys, self.values) if x is not None]
        return [*plain, *self.packed, *(self.turns() if self.packed_length else ())]

    def plain_bytes(self, element: int | None = None) -> int:
        """Bytes of all keys and values at `element` bytes for each number; None: as they came."""
        if self.keys is None or self.values is None or self.get_seq_length() == 0:
            return 0
        numbers = sum(x.shape[0] * x.shape[1] * x.shape[-1] for x in (self.keys, self.values))
        return numbers * self.get_seq_length() * (element or self.keys.element_size())

    def working_bytes(self) -> int:
        """Bytes of the keys and values that a read makes; 0 where nothing is packed."""
        return self.plain_bytes() if self.packed_length else 0
