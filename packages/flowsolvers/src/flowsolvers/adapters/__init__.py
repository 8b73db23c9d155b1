"""Adapters to other people's code, each imported only when it is named.

`flowsolvers.adapters.diffusers` is a scheduler for the flow pipelines of diffusers;
`flowsolvers.adapters.flow_matching` has the surface of its `ODESolver`;
`flowsolvers.adapters.torchdiffeq` has torchdiffeq's functions.
"""
