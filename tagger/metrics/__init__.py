"""Exact scores of an evaluation from 16-bit logits: what is kept, what is computed from it, and how sure that is."""
