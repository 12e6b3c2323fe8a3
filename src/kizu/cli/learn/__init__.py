"""Commands that learn: train and distill, the demo, and the page on which zones are drawn."""
