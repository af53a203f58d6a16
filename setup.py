"""What pyproject.toml can't say: configs/ is installed as the data of pipeline.recipes."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["pipeline*", "teacher_cache*", "student*", "serve*"]),
        "pipeline.recipes",
        "pipeline.recipes.ablations",
        "pipeline.recipes.clusters",
    ],
    package_dir={"pipeline.recipes": "configs"},
    package_data={
        "pipeline": ["*.txt"],
        **{f"pipeline.recipes{below}": ["*.yaml"] for below in ("", ".ablations", ".clusters")},
        "serve.page": ["*.html", "*.css", "*.js", "*.svg"],
    },
)
