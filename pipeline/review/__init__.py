"""Chooses the images that are most worth a look, and shows them to people who correct their labels."""
