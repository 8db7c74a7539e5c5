"""The student's weights to the servers that write its responses: one small interface, one module a transport."""
