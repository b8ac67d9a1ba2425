"""Hands a trained model on: weights, ONNX, timm's config.json, and a model card."""
