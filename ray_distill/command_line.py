"""The application ``ray-distill``: every command of the product, and the one place that reports a user's mistake.

``python -m ray_distill``, ``python pipeline/run.py``, ``python -m teacher_cache``, ``python -m serve`` and the console scripts enter
here. The modules of the commands import only typer and light modules at their top, so that ``--help`` needs neither PyTorch nor Ray.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ray_distill import __version__
from ray_distill.interruption import Interrupted, interruptible
from ray_distill.local_paths import in_home
from ray_distill.memory import ran_out_of_memory
from ray_distill.object_store import advice_about_store
from ray_distill.pipeline.commands.ablate import ablate
from ray_distill.pipeline.commands.convert import convert
from ray_distill.pipeline.commands.demo import demo
from ray_distill.pipeline.commands.export import export
from ray_distill.pipeline.commands.import_config import import_config
from ray_distill.pipeline.commands.plan_cluster import plan_cluster
from ray_distill.pipeline.commands.probe import probe
from ray_distill.pipeline.commands.profile import profile
from ray_distill.pipeline.commands.push import push
from ray_distill.pipeline.commands.run import run
from ray_distill.pipeline.commands.teachers import list_teachers, show_teacher
from ray_distill.pipeline.recipes import find_recipe
from ray_distill.serve.command import serve
from ray_distill.serve.settings import forget_service_link
from ray_distill.teacher_cache.commands import derive, info, repair, verify
from ray_distill.whole_files import is_disk_full

MISTAKES = (ValueError, OSError, FloatingPointError)
"""Exceptions that mean a mistake of the user; any other exception is our own and keeps its traceback."""

_SHORT_KEYS = ("teacher", "corpus", "cache", "name", "runs")
"""Keys of a configuration without a dot."""

TRACEBACK = "RAY_DISTILL_TRACEBACK"
"""Environment variable that, if set to 1, makes a user's mistake show its traceback too."""


class _Sentences:
    """Mixin for a command that reports a user's mistake as one sentence on standard error, with exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)  # type: ignore[misc]  # The mixin stands before a command.
        except Interrupted as interrupted:
            interrupted.leave()
        except MISTAKES as error:
            if os.environ.get(TRACEBACK) == "1":
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            sentence = " ".join(lines) or type(error).__name__
            if isinstance(error, OSError) and is_disk_full(error):
                sentence = f"{sentence}; free some space there and run the same command again"
            if advice := advice_about_store(sentence):
                sentence = f"{sentence.rstrip('.')}; {advice}"
            typer.secho(f"error: {sentence}", err=True, fg="red")
            sys.exit(2)
        except (RuntimeError, MemoryError) as error:
            if os.environ.get(TRACEBACK) == "1" or not ran_out_of_memory(error):
                raise
            advice = "use shorter audio or smaller batches, or a machine with more memory"
            typer.secho(f"error: memory ran out; {advice}", err=True, fg="red")
            sys.exit(2)


class ServerCommand(_Sentences, TyperCommand):
    """A command that handles signals itself; a user's mistake is one sentence on standard error, with exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments. Typer's messages lose the words with which pydantic begins those of some types."""
        forget_service_link(os.environ)
        try:
            return super().parse_args(ctx, [_in_home(arg) for arg in args])
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


class Command(ServerCommand):
    """A command; a user's mistake is one sentence on standard error, with exit code 2.

    Ctrl-C, SIGTERM and SIGHUP end it with one sentence too, and with exit codes 130, 143 and 129.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments. A key of the configuration that is written as an option is said to be none."""
        if any(parameter.name == "words" for parameter in self.params):
            known = {name for parameter in self.params for name in parameter.opts}
            for number, arg in enumerate(args):
                option, equals, value = arg.partition("=")
                key = option.removeprefix("--")
                if key != option and option not in known and ("." in key or key in _SHORT_KEYS):
                    value = value if equals else " ".join(args[number + 1 : number + 2]) or "VALUE"
                    raise ValueError(f"{option} is not an option but a key of the configuration; write {key}={value}")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with interruptible():
            return super().invoke(ctx)


def _in_home(arg: str) -> str:
    """Return an argument such as ``--output=~/student`` with the home folder, since a shell replaces only a leading ``~``."""
    option, _, value = arg.partition("=")
    return f"{option}={in_home(value)}" if option.startswith("--") and value.startswith("~") else arg


class Group(_Sentences, TyperGroup):
    """A group of commands; a user's mistake is one sentence on standard error, with exit code 2."""


class _Application(Group):
    """The group of all commands, whose default command is ``run``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {"--help", *self.commands, *(name for parameter in self.params for name in parameter.opts)}
        first = args[0] if args else ""
        is_recipe = "=" in first or first.startswith("-") or (first not in own and find_recipe(first).is_file())
        if first and first.split("=")[0] not in own and is_recipe:
            args = ["run", *args]
        return super().parse_args(ctx, args)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"ray-distill {__version__}")
        raise typer.Exit


application = typer.Typer(cls=_Application, no_args_is_help=True, pretty_exceptions_enable=False)


@application.callback(
    epilog="`ray-distill RECIPE` is short for `ray-distill run RECIPE`. An invalid input is reported in "
    f"one sentence, with exit code 2; {TRACEBACK}=1 shows its traceback as well."
)
def _describe(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Distil a speech encoder into a small student from cached teacher features."""


_PANELS: dict[str, dict[str, Any]] = {
    "Job": {
        "run": run,
        "demo": demo,
        "ablate": ablate,
        "import-config": import_config,
        "plan-cluster": plan_cluster,
    },
    "Students": {"export": export, "push": push, "convert": convert, "profile": profile, "probe": probe},
    "Service": {"serve": serve},
}
for _panel, _commands in _PANELS.items():
    for _name, _function in _commands.items():
        kind = ServerCommand if _name == "serve" else Command
        application.command(_name, cls=kind, rich_help_panel=_panel)(_function)

_cache = typer.Typer(
    cls=Group, no_args_is_help=True, help="Show, check or repair a teacher cache, or derive one from it."
)
for _function in (info, verify, repair, derive):
    _cache.command(cls=Command)(_function)
application.add_typer(_cache, name="cache", rich_help_panel="Teacher cache")

_teachers = typer.Typer(cls=Group, no_args_is_help=True, help="List known teachers, or show the facts of one.")
_teachers.command("list", cls=Command)(list_teachers)
_teachers.command("show", cls=Command)(show_teacher)
application.add_typer(_teachers, name="teachers", rich_help_panel="Teacher cache")


def main() -> None:
    """Run ``ray-distill`` with the arguments of this process."""
    application()


def main_cache() -> None:
    """Run ``ray-distill cache`` with the arguments of this process."""
    _run_alone("cache")


def main_serve() -> None:
    """Run ``ray-distill serve`` with the arguments of this process."""
    _run_alone("serve")


def _run_alone(name: str) -> None:
    typer.main.get_group(application).commands[name].main()
