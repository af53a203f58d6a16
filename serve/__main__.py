"""``python -m ray_distill.serve --model FOLDER`` starts the feature service."""

from ray_distill.serve.command import main

if __name__ == "__main__":
    main()
