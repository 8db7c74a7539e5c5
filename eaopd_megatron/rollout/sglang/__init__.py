"""Rollouts by SGLang servers: requests and answers, which server is the right one, and servers that the run starts."""
