"""Checkpoints without models: headers, tensors, adapters and what a model's shapes say about it."""
