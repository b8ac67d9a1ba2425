"""Keeps the journals and mirrors them into MLflow."""
