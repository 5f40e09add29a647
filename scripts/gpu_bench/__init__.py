"""The sections of `scripts/benchmark_gpu.py`: each a function of the bench that yields figures as it measures them."""
