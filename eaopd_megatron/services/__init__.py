"""What the trainer's ranks need to use processes of another role: a client a server, several servers as one pool,
servers started here and started again, news that one rank hears told to all. Shared by the rollout's servers and by
teachers that do not live on these ranks."""
