"""A self-contained S3PRL upstream: expert, hubconf, weights and configuration; plain PyTorch, 1.13 or newer."""

import json
import keyword
from pathlib import Path

import torch

from ray_distill.student.exporters.origin import Origin, describe
from ray_distill.student.exporters.portable import portable_student, weights_of
from ray_distill.student.model.student import Student

_HERE = Path(__file__).parent

_HUBCONF = '''"""Entry points of this upstream, as S3PRL collects them."""

from .expert import UpstreamExpert as _UpstreamExpert


def {name}_local(ckpt=None, model_config=None, **others):
    """The student with these weights and this configuration; by default those in this folder."""
    return _UpstreamExpert(ckpt, model_config, **others)


def {name}(**others):
    """The student in this folder."""
    return _UpstreamExpert()
'''

_LAUNCHER = '''"""S3PRL's run_downstream.py with this folder's upstream added; takes the same arguments.

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

Everything is in this folder; it needs PyTorch 1.13 or newer and nothing else, S3PRL to train with. `hidden_states` are
the encoder's input and the output of each of {layers} layers, {width} wide, a frame every {stride} samples. An
utterance's features don't depend on what it is batched with.

Without changing S3PRL:

    python {name}/run_downstream.py -u {name}_local -k {name}/weights.pt -g {name}/config.json \\
        -m train -d asr -c CONFIG.yaml -p EXPERIMENT

or copy the folder to `s3prl/upstream/{name}`, add `from s3prl.upstream.{name}.hubconf import *` to `s3prl/hub.py`, and use S3PRL's own
`run_downstream.py -u {name}_local -k ... -g ...`.

## Origin

{origin}
"""


def usable_name(name: str) -> bool:
    """Whether Python, and so S3PRL, can import a folder of this name."""
    return name.isidentifier() and not keyword.iskeyword(name)


def export_s3prl(student: Student, folder: Path, origin: Origin) -> None:
    """Writes the upstream into a new folder, whose name becomes the upstream's.

    Args:
        student: to export.
        folder: must not hold files; its name is a Python name, such as ``my_student``.
        origin: what the export says of itself.

    Raises:
        ValueError: a folder that can't be used, or a student that exports don't support.
    """
    name = folder.name
    if not usable_name(name):
        raise ValueError(
            f"S3PRL imports the folder, so its name must be a Python name such as my_student, not {name!r}"
        )
    model = portable_student(student)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder")
    torch.save(weights_of(model), folder / "weights.pt")
    (folder / "config.json").write_text(json.dumps({"model": model.config, "origin": origin}, indent=2) + "\n")
    for source, target in (("portable_model.py", "portable_model.py"), ("s3prl_expert.py", "expert.py")):
        (folder / target).write_text((_HERE / source).read_text())
    (folder / "__init__.py").write_text("")
    (folder / "hubconf.py").write_text(_HUBCONF.format(name=name))
    (folder / "run_downstream.py").write_text(_LAUNCHER.format(name=name))
    facts = {"layers": len(model.layers), "width": model.config["encoder_embed_dim"], "stride": model.stride}
    lines = "\n".join(f"- {line}" for line in describe(origin)) or "Not known."
    (folder / "README.md").write_text(_README.format(name=name, origin=lines, **facts))
