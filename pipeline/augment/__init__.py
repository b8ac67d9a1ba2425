"""Noises training images; the teacher never is, so labelling cannot import this room."""
