"""What the papers look at besides accuracy: distances between data sets, attributions, embeddings, significance."""
