"""The packages, which pyproject.toml can't express: folders are installed inside ``ray_distill``, and ``configs/`` as recipes."""

from setuptools import find_packages, setup

FOLDERS = ("pipeline", "teacher_cache", "student", "serve")
RECIPES = {"ray_distill.recipes": "configs"}

setup(
    packages=[
        "ray_distill",
        *(f"ray_distill.{package}" for folder in FOLDERS for package in find_packages(include=[folder, f"{folder}.*"])),
        *RECIPES,
        "ray_distill.recipes.ablations",
        "ray_distill.recipes.clusters",
        "ray_distill.recipes.discrete",
        "ray_distill.recipes.pruned",
        "ray_distill.recipes.several",
    ],
    package_dir={f"ray_distill.{folder}": folder for folder in FOLDERS} | RECIPES,
    package_data={
        "ray_distill": ["py.typed"],
        "ray_distill.pipeline.demo": ["*.txt"],
        "ray_distill.pipeline.reports": ["templates/*"],
        "ray_distill.teacher_cache.teachers.builtin": ["*/*.json", "*/*.safetensors", "*/*.md"],
        "ray_distill.teacher_cache.teachers.known": ["*.json"],
        **{
            f"ray_distill.recipes{below}": ["*.yaml", "*.json"]
            for below in ("", ".ablations", ".clusters", ".discrete", ".pruned", ".several")
        },
        "ray_distill.serve.page": ["*.html", "*.css", "*.js", "*.svg", "*.flac"],
        "ray_distill.serve.reference": ["*.html", "*.js", "*.gz", "*.txt"],
    },
)
