"""What the evaluation command is made of: which images and weights, what is written of them, and how two compare."""
