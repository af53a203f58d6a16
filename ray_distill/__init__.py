"""Distil a speech encoder into a student a quarter of its size, running the teacher only once.

In the repository, the sub-packages are the top-level folders beside this one: ``ray_distill.student`` is ``student/``. An installed
wheel contains them in ``ray_distill/``.
"""

from pathlib import Path

__version__ = "0.1.0"

_REPOSITORY = Path(__file__).resolve().parent.parent
if not Path(__file__).with_name("student").is_dir() and (_REPOSITORY / "student").is_dir():
    __path__.append(str(_REPOSITORY))
