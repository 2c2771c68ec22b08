"""`python -m infera_server PATH...`, the same as `infera serve PATH...`."""

import typer

from infera_server.cli import serve

if __name__ == "__main__":
    typer.run(serve)
