"""Judges what a camera drops into a folder, each photograph once, and tells others."""
