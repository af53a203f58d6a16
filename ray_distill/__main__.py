"""``python -m ray_distill``: the same as ``ray-distill``."""

from ray_distill.command_line import main

if __name__ == "__main__":
    main()
