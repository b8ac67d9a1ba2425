"""Corrupts test pictures in the ways of Hendrycks and Dietterich (2019), and says how much that costs a model."""
