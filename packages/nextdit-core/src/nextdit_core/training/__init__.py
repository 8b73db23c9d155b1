"""Training that is true on one device or a thousand.

`plan` decides which samples make up each step, `draws` what is random about each of them,
`objective` what is learnt, `loop` runs it through a `Runtime` that an engine supplies.
"""
