"""Adapters to other people's code, each imported only when it is named.

`flowsolvers.adapters.torchdiffeq` has torchdiffeq's functions.
"""
