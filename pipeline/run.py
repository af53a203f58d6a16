"""``python pipeline/run.py``: the same as ``ray-distill``, for ``ray job submit --working-dir .``, which installs nothing."""

import sys
from pathlib import Path

# The path of a script starts with its own folder, pipeline/; ray_distill is found in the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ray_distill.command_line import main

if __name__ == "__main__":
    main()
