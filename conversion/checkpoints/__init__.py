"""Checkpoints read and written: folders and the Hub, tensors by name, shards piece by piece."""
