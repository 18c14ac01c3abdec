"""`python -m fixmin_cpp`: the command `fixmin` of this Python, also where its folder of scripts is not in PATH."""

from .cli import main

main()
