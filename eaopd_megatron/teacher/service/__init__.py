"""The teacher in a role of its own (`eaopd teach`): token ids in, what it says of them out, stateless, over HTTP."""
