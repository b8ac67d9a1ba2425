"""Selects pseudo-labelled samples, exactly and in constant memory."""
