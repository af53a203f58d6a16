"""``ray-distill push``: a student on the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def push(
    model: Annotated[
        Path, typer.Argument(help="Folder of a run, of an export or of a checkpoint; or a published .ckpt file.")
    ],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; created if there is none.")],
    license: Annotated[
        str,
        typer.Option(
            help="License of the student, such as apache-2.0. It must be compatible with those of the teacher and the data."
        ),
    ],
    language: Annotated[
        list[str] | None, typer.Option(help="Code of a language of the training audio, such as en; may be repeated.")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Training data on the hub, such as openslr/librispeech_asr; may be repeated."),
    ] = None,
    features: Annotated[
        Literal["heads", "layers"] | None, typer.Option(help="Features to export; see `export --help`.")
    ] = None,
    model_config: Annotated[Path | None, typer.Option(help="YAML file of a published .ckpt.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of a repository that has some.")] = False,
) -> None:
    """Publish a student on the Hugging Face Hub with its card.

    The student is exported for transformers. Its record of the origin is published without the paths of this machine.
    HF_TOKEN must be a token that may write there.
    """
    from ray_distill.pipeline.publishing.hub_push import CardFacts, push_student
    from ray_distill.pipeline.student_export import open_student

    student, origin = open_student(model, model_config)
    facts = CardFacts(license, language or (), dataset or ())
    typer.echo(f"push    {push_student(student, origin, name, facts, features=features, private=private, force=force)}")
