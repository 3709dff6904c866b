"""Answers over HTTP: many adapters over one backbone in memory, batched across requests. Needs the extra `serve`."""
