"""The old name of `regdrop.prefix_search`, kept for two minor releases."""

import warnings

from regdrop.prefix_search import PrefixSuggestion, suggest_prefix

warnings.warn("regdrop.suggestion is now regdrop.prefix_search", DeprecationWarning, stacklevel=2)

__all__ = ["PrefixSuggestion", "suggest_prefix"]
