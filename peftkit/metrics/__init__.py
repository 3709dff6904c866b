"""Metrics as `evaluate` modules that need no network."""
