"""A block of classes of a linear layer or of a process, and what a kernel does with it."""

from typing import NamedTuple, Protocol

from torch import Tensor

from regdrop.kernels.precision import accumulation_dtype
from regdrop.kernels.target import Target


class Columns(NamedTuple):
    """The classes from `first` on, as products of a linear layer: logits are made of them."""

    products: Tensor  # (num_passes, n, width)
    first: int
    num_classes: int  # of all blocks together
    scale: float = 1.0
    softcap: float | None = None

    def rows(self, start: int, stop: int) -> "Columns":
        """Return the same classes of the items from `start` to `stop`."""
        return self._replace(products=self.products[:, start:stop])


class RowSums(NamedTuple):
    """What blocks of classes leave of n items for those to come, and what they end in.

    Attributes:
        statistics: All of it, (rows, n). For each pass its maximum, then its sum of
            e = exp(z - maximum), then its sum of e times the difference from the mean over passes;
            the target's mass; the following. After the last block the sum is inverted, and the
            difference is its mean.
        nll: (n,), the NLL, after the last block.
        kl: (n,), the divergence, after the last block.
        cross: (num_passes, n), the sum of target times (z - maximum); the last rows of
            `statistics` where it is carried.
    """

    statistics: Tensor
    nll: Tensor
    kl: Tensor
    cross: Tensor

    @classmethod
    def empty(cls, like: Tensor, *, carried: bool = True) -> "RowSums":
        """Return memory for products (num_passes, n, ...); no `cross` unless sums are carried."""
        num_passes, num_items = like.shape[:2]
        nll = 3 * num_passes + 1
        rows = nll + 2 + (num_passes if carried else 0)
        memory = like.new_empty(rows, num_items, dtype=accumulation_dtype(like.dtype))
        return cls(memory, memory[nll], memory[nll + 1], memory[nll + 2 :])


class CollectColumns(Protocol):
    """Adds a block of classes to the sums; after the last one they become terms and statistics."""

    def __call__(
        self,
        columns: Columns,
        target: Target,
        sums: RowSums,
        is_first: bool,
        is_last: bool,
        /,
    ) -> None:
        """Write to `sums`; what is there before the first block counts for nothing."""


class WriteColumns(Protocol):
    """Writes the gradient of a block's products to `out`, the products themselves or other memory.

    As `BackwardKernel` does for logits; `statistics` are those of the `RowSums` after all blocks.
    """

    def __call__(
        self,
        out: Tensor,
        columns: Columns,
        target: Target,
        statistics: Tensor,
        grads: tuple[Tensor | None, Tensor | None],
        backward_passes: int,
        /,
    ) -> None:
        """Write the gradient of the first passes, and 0 to the others."""


class ClassRows(NamedTuple):
    """One way to go through blocks of classes."""

    collect: CollectColumns
    write: WriteColumns
