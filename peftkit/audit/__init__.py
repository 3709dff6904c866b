"""What is wrong with the data of a run, with file and line, before anything is trained on it."""
