"""Finished runs looked at again: on other data, and against their own sub-models."""
