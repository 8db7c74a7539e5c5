"""Benchmarks, graders, unbiased estimators over samples, and the files of results. Import its modules by name."""
