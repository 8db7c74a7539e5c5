"""The student's responses: one small interface, one module an engine."""
