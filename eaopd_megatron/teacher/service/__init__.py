"""The teacher as a role of its own (`eaopd teach`): token ids in, its output for them out, stateless, over HTTP."""
