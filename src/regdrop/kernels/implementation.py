"""The names of the kernels."""

from typing import Literal, get_args

Implementation = Literal["auto", "eager", "chunked", "compiled", "cpp", "triton"]
_IMPLEMENTATIONS = get_args(Implementation)


def check_implementation(impl: str) -> None:
    """Check a name.

    Raises:
        ValueError: If there is no such implementation.
    """
    if not isinstance(impl, str) or impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {_IMPLEMENTATIONS}, got {impl!r}")
