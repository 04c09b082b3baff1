"""`python -m fate_llm` is the command `fate_llm`."""

from .cli.main import main

main()
