"""A run of the Trainer: what each step does, and what is kept of it."""
