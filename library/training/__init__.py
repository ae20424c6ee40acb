"""Floor 4: the training loop, what it trains, its checkpoints and its hooks."""
