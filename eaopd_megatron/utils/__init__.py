"""Helpers without knowledge of models and ranks: files, environment, log lines, process lifetime."""
