"""Helpers that know nothing of models or ranks: files, the environment, log lines, process lifetime."""
