"""What pyproject.toml can't say: configs/ is installed as the data of pipeline.recipes."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["pipeline*", "teacher_cache*", "student*", "serve*"]),
        "pipeline.recipes",
        "pipeline.recipes.clusters",
    ],
    package_dir={"pipeline.recipes": "configs"},
    package_data={
        "pipeline": ["*.txt"],
        "pipeline.recipes": ["*.yaml"],
        "pipeline.recipes.clusters": ["*.yaml"],
        "serve.page": ["*.html", "*.css", "*.js", "*.svg"],
    },
)
