"""What good photographs alone can promise: the threshold, outliers among them, drift of the scores."""
