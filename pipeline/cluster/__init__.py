"""Runs work on processes and machines: inline, under torchrun, or on Ray, which only this room imports."""
