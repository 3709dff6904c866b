"""Data: files, bundled data sets, local folders and the hub, as rows that know where they came from."""
