"""A run's metrics log, its display during training, its warnings and its report. Import its modules by name."""
