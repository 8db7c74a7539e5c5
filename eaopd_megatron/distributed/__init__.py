"""Process groups, errors that all ranks raise together, broadcasts of events, heartbeat, and the CPU stand-in."""
