"""`python -m regdrop`, and so `torchrun -m regdrop`: the command line."""

from regdrop.cli import main

main()
