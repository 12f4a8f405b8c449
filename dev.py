#!/usr/bin/env python3
"""The one tool of this checkout: sets up a ComfyUI with the pack in it, and runs things there.

Needs nothing but Python 3.10 to 3.13. Everything it makes is in `.dev/`, which git ignores.

    python dev.py demo                  make pictures with the shipped model
    python dev.py test                  run all tests
    python dev.py serve                 open ComfyUI with the pack installed
    python dev.py workflow FILE         run a workflow without a window
    python dev.py bench NAME            run a benchmark
    python dev.py matrix                run the smoke tests on older ComfyUIs, Pythons and torches
    python dev.py pack                  build the archive for the ComfyUI registry in dist/
    python dev.py python SCRIPT …       run a script with `quanttune` and `comfy` importable
    python dev.py clean                 delete what was set up
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (this line is for the Pythons that it turns away)
    sys.exit("This Python is too old: run dev.py with Python 3.10 to 3.13.")

import argparse
from pathlib import Path

from devtools import archive, environment, jobs, matrix
from devtools.console import Stop, end_on_sigterm, say


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--comfyui",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="use this ComfyUI instead of the one dev.py fetches ('pinned' means the latter)",
    )
    common.add_argument(
        "--verbose", action="store_true", default=argparse.SUPPRESS, help="show where it failed"
    )
    parser = argparse.ArgumentParser(
        prog="dev.py",
        description=__doc__,
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, parents=[common], allow_abbrev=False
        )

    add("demo", "set everything up, run the main job on the CPU, leave pictures in demo-output/")
    add("test", "run the tests; all further arguments go to pytest")
    serve = add("serve", "run the GUI; arguments after -- go to ComfyUI")
    serve.add_argument("--port", type=int)
    serve.add_argument("--cpu", action="store_true", default=None, help="do not use the GPU")
    flow = add("workflow", "run one workflow file in a real ComfyUI")
    flow.add_argument("file", type=Path)
    flow.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", dest="settings"
    )
    flow.add_argument("--out", type=Path, default=Path("output"), help="folder for the pictures")
    flow.add_argument("--cpu", action="store_true", default=None, help="do not use the GPU")
    bench = add("bench", "run benchmarks/NAME.py; arguments after -- go to it")
    bench.add_argument("name")
    bench.add_argument("--json", metavar="FILE", help="also write the numbers there")
    cells = add("matrix", "run the smoke tests on several ComfyUIs, Pythons and torches")
    cells.add_argument("--hosts", nargs="+", default=[], metavar="VERSION")
    cells.add_argument("--pythons", nargs="+", default=[], metavar="3.X")
    cells.add_argument("--torch", nargs="+", default=[], metavar="newest|oldest")
    cells.add_argument("--keep", action="store_true", help="keep the environments that are made")
    cells.add_argument("--again", action="store_true", help="also run what has passed before")
    add("pack", "build the archive for the ComfyUI registry")
    add("python", "run a script in the managed environment")
    add("clean", "delete .dev/ and demo-output/")
    return parser


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    if options.command == "clean":
        return jobs.clean()
    if options.command == "pack":
        return archive.build_command()
    if options.command == "matrix":
        cells = matrix.choose(options.hosts, options.pythons, options.torch)
        return matrix.run(cells, keep=options.keep, again=options.again, arguments=rest)
    env = environment.prepare(getattr(options, "comfyui", None), tests=options.command == "test")
    if options.command == "demo":
        return jobs.demo(env)
    if options.command == "test":
        return jobs.test(env, rest)
    if options.command == "serve":
        return jobs.serve(env, options.port, options.cpu, rest)
    if options.command == "workflow":
        jobs.run_workflow(env, options.file, options.settings, options.out, cpu=options.cpu)
        return 0
    if options.command == "bench":
        return jobs.bench(env, options.name, options.json, rest)
    return jobs.python(env, rest)


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    arguments, script = jobs.script_arguments(arguments)
    options, rest = parser.parse_known_args(arguments)
    rest = script or (rest[1:] if rest[:1] == ["--"] else rest)
    if rest and options.command in ("demo", "workflow", "clean", "pack"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    end_on_sigterm()
    try:
        return _run(options, rest)
    except Stop as stop:
        if getattr(options, "verbose", False):
            raise
        say(f"dev.py: {stop}")
        return 1
    except KeyboardInterrupt:
        say("dev.py: stopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
