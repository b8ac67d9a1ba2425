"""Trains: one loop for teachers, students and fine-tunes."""
