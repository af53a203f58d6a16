"""The console command ``ray-distill-serve``: ``python -m serve``."""

import runpy


def main() -> None:
    """Starts the service with the command line's arguments."""
    runpy.run_module("ray_distill.serve", run_name="__main__")
