"""A photograph in, a verdict out, the same for trained and exported models. Nothing here needs torch."""
