"""Verdicts for other programs and for people: HTTP, the inspection page, and the watched folder."""
