"""What is left of a run: the adapter, its manifest, the merged model, predictions."""
