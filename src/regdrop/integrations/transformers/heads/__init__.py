"""What a model predicts, from its class and its batch."""
