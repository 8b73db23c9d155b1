"""Run the command line as `python -m nextdit_core`, for launchers such as torchrun."""

from nextdit_core.cli import main

main()
