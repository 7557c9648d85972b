"""Thin command-line entries, one per verb."""
