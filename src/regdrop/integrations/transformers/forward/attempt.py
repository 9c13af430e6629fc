"""What is tried on a model that may refuse it: a look that fails tells as much as one that does."""

from collections.abc import Callable
from typing import TypeVar

from regdrop.out_of_memory import is_out_of_memory

T = TypeVar("T")
Otherwise = TypeVar("Otherwise")


def attempt(look: Callable[[], T], otherwise: Otherwise) -> T | Otherwise:
    """Return what a look returns; `otherwise` where it raises, whatever a model then raises.

    Memory that runs out is raised: it says nothing of the model.
    """
    try:
        return look()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return otherwise
