"""Comparisons of methods: a grid of runs, what came of each, and what can be concluded."""
