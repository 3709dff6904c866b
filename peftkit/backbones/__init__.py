"""Pretrained models: where they come from, how they are kept, how they are loaded."""
