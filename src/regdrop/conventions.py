"""The old name of `regdrop.alpha_conventions`, kept for two minor releases."""

import warnings

from regdrop.alpha_conventions import CONVENTIONS, Convention, convert_alpha

warnings.warn(
    "regdrop.conventions is now regdrop.alpha_conventions", DeprecationWarning, stacklevel=2
)

__all__ = ["CONVENTIONS", "Convention", "convert_alpha"]
