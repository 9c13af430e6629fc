"""Batches by their number of tokens, padding included: disjoint over ranks, the same on resume."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of sentences of about the same length, none above a number of tokens.

    Every epoch draws anew which of the sentences of one length share a batch, and the order of the
    batches; their number is the same. All ranks take the same number: what is left over, fewer
    batches than ranks, is left out of the epoch.

    Args:
        lengths: Tokens of each sentence; of a pair, of the longer side.
        max_tokens: Most tokens a batch, its longest length times its sentences.
        seed: Seed of the order, the same on all ranks.
        rank: This process.
        num_ranks: Number of processes.

    Raises:
        ValueError: If a sentence is longer than a batch may be, or there are fewer batches than
            ranks.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        max_tokens: int,
        *,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.max_tokens, self.seed, self.rank, self.num_ranks = max_tokens, seed, rank, num_ranks
        self.epoch = 0
        longest = int(self.lengths.max(initial=0))
        if longest > max_tokens:
            raise ValueError(
                "training.batch_size over gradient_accumulation_steps and processes must be at "
                f"least the {longest} tokens of the longest example, got {max_tokens}"
            )
        self._bounds = self._find_bounds()
        if len(self._bounds) < num_ranks:
            raise ValueError(
                f"data must fill a batch for each of {num_ranks} processes, "
                f"got {len(self._bounds)} batches of {max_tokens} tokens"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._bounds) // self.num_ranks

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        ties = generator.permutation(len(self.lengths))
        order = ties[np.argsort(self.lengths[ties], kind="stable")]
        shuffled = generator.permutation(len(self._bounds))[: len(self) * self.num_ranks]
        for position in shuffled[self.rank :: self.num_ranks]:
            start, end = self._bounds[position]
            yield order[start:end].tolist()

    def _find_bounds(self) -> list[tuple[int, int]]:
        """Return where batches begin and end in any order by length."""
        bounds, start = [], 0
        ordered = np.sort(self.lengths)
        for end in range(1, len(ordered) + 1):
            is_last = end == len(ordered)
            if is_last or int(ordered[end]) * (end + 1 - start) > self.max_tokens:
                bounds.append((start, end))
                start = end
        return bounds


class TokenBatchLoader(DataLoader[Any]):
    """A loader over a TokenBatchSampler, which follows the trainer's epochs."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the sampler."""
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)
