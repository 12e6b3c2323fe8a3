"""Runs side by side: finished ones, or every category × method × setting × seed."""
