"""The graphs that torch.compile makes of a function, counted call by call."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


def count_graphs(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], **options: Any
) -> list[int]:
    """Return how many graphs there are after each call of a function that returns a loss.

    The graphs are traced and run as they are, which needs no C++ compiler.

    Args:
        function: It is compiled, and the backward of what it returns runs too.
        calls: The arguments of each call.
        options: Those of `torch.compile`.
    """
    count, found = 0, []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, **options)
    for arguments in calls:
        compiled(*arguments).sum().backward()
        found.append(count)
    return found
