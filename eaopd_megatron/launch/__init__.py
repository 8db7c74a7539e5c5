"""Start the ranks of one host, join ranks that others started, and report how a rank ended."""
