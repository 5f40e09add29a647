"""Checkpoints: a snapshot in host memory, a background writer, and folders that are whole or not there."""
