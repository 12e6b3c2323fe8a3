"""Patch features from pretrained networks, anomaly maps made of patch scores, and files of weights read safely."""
