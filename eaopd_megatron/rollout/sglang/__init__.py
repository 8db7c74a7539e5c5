"""Rollouts by SGLang servers: requests and answers, one server's client, the pool of them, and servers of our own."""
