"""What the teacher says of the student's tokens: one small interface, one module a placement."""
