"""Orders the training data and loads batches of it."""
