"""Reads job files into settings, and checks them."""
