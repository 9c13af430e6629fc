"""The commands, a file for each kind."""

from regdrop.commands import comparisons, models, runs
from regdrop.commands.app import app

__all__ = ["app", "comparisons", "models", "runs"]
