"""`python -m kizu` is `kizu`."""

from kizu.cli.main import main

main()
