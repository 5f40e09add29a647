"""Costs of single logits, their sums over a batch, and the sum taken through the head in chunks of tags."""
