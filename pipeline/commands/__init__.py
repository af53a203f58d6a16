"""The commands of ``ray-distill`` that belong to the job, one module each.

Each module imports only typer and light modules at its top, so that ``--help`` is fast; the function imports the rest.
"""
