"""Work that the processes of one run share before they train."""

from collections.abc import Callable

import torch


def share_work(count: int, work: Callable[[range], None]) -> None:
    """Do some pieces of work; of several processes of a run (torchrun) each does its part.

    What one of them raises is raised in all, for the main one alone speaks.

    Args:
        count: Number of pieces.
        work: Does those of some positions.

    Raises:
        ValueError: As `work` does, in this process or another.
        OSError: As `work` does, in this process.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        work(range(count))
        return
    size = distributed.get_world_size()
    own: Exception | None = None
    try:
        work(range(distributed.get_rank(), count, size))
    except (ValueError, OSError) as error:
        own = error
    said: list[str | None] = [None] * size
    distributed.all_gather_object(said, None if own is None else str(own))
    if own is not None:
        raise own
    if other := next((text for text in said if text is not None), None):
        raise ValueError(other)
