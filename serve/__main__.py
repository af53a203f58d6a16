"""``python -m serve`` and ``python -m ray_distill.serve``: the same as ``ray-distill serve``."""

from ray_distill.command_line import main_serve

if __name__ == "__main__":
    main_serve()
