"""Sub-commands of `nextdit`. Their modules import nothing heavy before a command runs."""
