"""How good a detector is: metrics, runs with their results folder, reports, operating points."""
