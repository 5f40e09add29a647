"""Mechanisms below the chapters of the suite: they take plain arguments and never import a root file."""
