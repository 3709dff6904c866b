"""Advice on the method for one configuration: a comparison in miniature, on its own data."""
