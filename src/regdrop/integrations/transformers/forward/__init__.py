"""A batch through a model, to what the loss reads; and whether the model computes the same."""
