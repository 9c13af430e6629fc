"""The old place of the Adaptive Input Transformer, kept for two minor releases."""

import warnings

from regdrop.tasks.language_modelling.adaptive_input import (
    AdaptiveInputConfig,
    AdaptiveInputForCausalLM,
    register,
)

warnings.warn(
    "regdrop.tasks.adaptive_input is now regdrop.tasks.language_modelling.adaptive_input",
    DeprecationWarning,
    stacklevel=2,
)

__all__ = ["AdaptiveInputConfig", "AdaptiveInputForCausalLM", "register"]
