"""Commands about a verdict that is to hold, and about what was judged: check, drift, tune, report, compare."""
