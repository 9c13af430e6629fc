"""Lines about data that is taken otherwise than it is written."""

import logging
from functools import cache

_logger = logging.getLogger(__name__)


@cache
def say_once(line: str) -> None:
    """Say a line once a process, and not in every run of a comparison."""
    _logger.warning(line)
