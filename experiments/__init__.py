"""One run: its configuration, data, training, checkpoints, generation and record."""
