"""Export to a self-contained S3PRL upstream: expert, hubconf, weights and configuration, for PyTorch 1.13 or newer."""

import io
import json
import keyword
from pathlib import Path

import torch

from ray_distill.student.exporters.origin import Origin, describe
from ray_distill.student.exporters.portable import SOURCES, Features, named_weights, portable_student
from ray_distill.student.model.student import Student
from ray_distill.whole_files import filling

_HERE = Path(__file__).parent

_HUBCONF = '''"""Entry points of this upstream for S3PRL."""

from .expert import UpstreamExpert as _UpstreamExpert


def {name}_local(ckpt=None, model_config=None, **others):
    """Return the student with these weights and this configuration. Default: those in this folder."""
    return _UpstreamExpert(ckpt, model_config, **others)


def {name}(**others):
    """Return the student in this folder."""
    return _UpstreamExpert()
'''

_LAUNCHER = '''"""Run S3PRL's run_downstream.py with the upstream of this folder; takes the same arguments.

    python FOLDER/run_downstream.py -u {name} -m train -d asr -c CONFIG.yaml -p EXPERIMENT
"""

import importlib
import sys
from pathlib import Path

_folder = Path(__file__).resolve().parent
sys.path.insert(0, str(_folder.parent))

from s3prl import hub, run_downstream

_hubconf = importlib.import_module(_folder.name + ".hubconf")
for _name in ("{name}", "{name}_local"):
    setattr(hub, _name, getattr(_hubconf, _name))

if __name__ == "__main__":
    run_downstream.main()
'''

_README = """# A distilled student as an S3PRL upstream

This folder is complete: it only needs PyTorch 1.13 or newer, and S3PRL for training. `hidden_states` are {states},
with one frame every {stride} samples. The features of an utterance do not depend on the other utterances in its batch.

To use it without changing S3PRL, run

    python {name}/run_downstream.py -u {name}_local -k {name}/weights.pt -g {name}/config.json \\
        -m train -d asr -c CONFIG.yaml -p EXPERIMENT

Alternatively, copy the folder to `s3prl/upstream/{name}`, add `from s3prl.upstream.{name}.hubconf import *` to `s3prl/hub.py`,
and run S3PRL's own `run_downstream.py -u {name}_local -k ... -g ...`.

## Origin

{origin}
"""


def usable_name(name: str) -> bool:
    """Return whether Python, and therefore S3PRL, can import a folder of this name."""
    return name.isidentifier() and not keyword.iskeyword(name)


def export_s3prl(student: Student, folder: Path, origin: Origin, features: Features = "layers") -> None:
    """Write the upstream into a folder, whose name becomes the name of the upstream.

    Args:
        student: Student to export.
        folder: New or empty folder; its name must be a Python identifier, such as ``my_student``.
        origin: Origin of the student.
        features: Features that the upstream returns. Default ``layers``.

    Raises:
        ValueError: the folder can't be used, or the student has options that exports do not support.
    """
    name = folder.name
    if not usable_name(name):
        raise ValueError(
            f"S3PRL imports the folder, so its name must be a Python identifier such as my_student, not {name!r}"
        )
    model = portable_student(student, features)
    with filling(folder) as written:
        buffer = io.BytesIO()  # torch.save's own error does not mention a full disk.
        torch.save(named_weights(model), buffer)
        (written / "weights.pt").write_bytes(buffer.getbuffer())
        (written / "config.json").write_text(json.dumps({"model": model.config, "origin": origin}, indent=2) + "\n")
        for source, target in (*((name, name) for name in SOURCES), ("s3prl_expert.py", "expert.py")):
            (written / target).write_text((_HERE / source).read_text())
        (written / "__init__.py").write_text("")
        (written / "hubconf.py").write_text(_HUBCONF.format(name=name))
        (written / "run_downstream.py").write_text(_LAUNCHER.format(name=name))
        states = f"the encoder's input and the outputs of {len(model.layers)} layers, of width {model.width}"
        if features == "heads":
            states = f"the predictions of {model.num_features} layers of the teacher by the student's heads, of width {model.width}"
        lines = "\n".join(f"- {line}" for line in describe(origin)) or "Unknown."
        (written / "README.md").write_text(_README.format(name=name, origin=lines, states=states, stride=model.stride))
