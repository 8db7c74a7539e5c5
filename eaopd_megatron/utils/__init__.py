"""Helpers without knowledge of models and ranks: files, ports, environment, log lines, process lifetime."""
