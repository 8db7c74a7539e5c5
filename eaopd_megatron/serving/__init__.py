"""Clients, pools, processes and supervision for servers of another role."""
