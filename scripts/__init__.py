"""Commands: thin programs over the chapters, each run as `python -m scripts.NAME`."""
