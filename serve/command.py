"""The console command ``ray-distill-serve``: ``python -m serve``."""

import runpy


def main() -> None:
    """Starts the service with the command line's arguments."""
    runpy.run_module("serve", run_name="__main__")
