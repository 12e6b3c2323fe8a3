"""Photographs: reading and writing them, the layouts of data sets, batches for a network, and the demo's images."""
