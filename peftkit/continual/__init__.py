"""Tasks learnt one after the other, and what becomes of the earlier ones."""
