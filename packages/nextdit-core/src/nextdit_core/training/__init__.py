"""Training that is true on one device or a thousand.

`plan` decides which samples make up each step, `draws` what is random about each of them,
`batch` what a model is shown, `loop` runs it through a `Runtime` that an engine supplies.
"""
