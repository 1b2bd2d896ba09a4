"""Embedding lookup: every backend against the fp64 reference and torch."""
