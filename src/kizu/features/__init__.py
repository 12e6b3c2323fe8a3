"""From pixels to patch features, and back to an anomaly map; files of weights."""
