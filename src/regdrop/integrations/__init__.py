"""One package or file a training framework; each imports the core and its own framework only."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import a framework, or say which of regdrop's extras brings what is missing.

    Args:
        name: Name of the extra.

    Raises:
        ModuleNotFoundError: If a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is missing: pip install 'regdrop[{name}]' brings it", name=error.name
        ) from error
