"""`eaopd doctor`: the machine, and whether student and teacher end responses alike."""
