"""Prompts, samples, packing and the prompt cursor."""
