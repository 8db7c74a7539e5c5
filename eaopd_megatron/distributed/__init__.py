"""Process groups, collective errors, broadcasts of events, failure detection, and CPU stand-ins for CUDA."""
