"""``python -m teacher_cache info|verify|repair|derive CACHE``: the same as ``ray-distill cache``."""

from ray_distill.command_line import main_cache

if __name__ == "__main__":
    main_cache()
