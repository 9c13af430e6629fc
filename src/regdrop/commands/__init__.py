"""The commands, a file for each kind."""

from regdrop.commands import comparisons, measure, models, runs, tasks, tuning
from regdrop.commands.app import app

__all__ = ["app", "comparisons", "measure", "models", "runs", "tasks", "tuning"]
