"""Weights in and out: Hugging Face folders and distributed checkpoints."""
