"""Draws the report, and what `measure` shows."""
