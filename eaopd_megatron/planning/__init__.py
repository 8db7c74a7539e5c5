"""What a layout costs in memory, traffic and time, before it is run. Needs neither torch nor Megatron-Core."""
