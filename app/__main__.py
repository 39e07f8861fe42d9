"""`python -m app`: read the settings and serve; and the other commands, of which `--help` tells."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from app.bulk import extra, options
from app.lifecycle import ExitCode
from app.logs import configure_logging
from app.process import tame_threads
from app.settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from app.engine.engine import LoadModel


def main() -> int:
    """Runs the command that the command line names; returns its exit code."""
    arguments = parse_arguments()
    if arguments.command == "embed" and (missing := extra.missing_libraries()):
        print(f"python -m app embed needs {' and '.join(missing)}: pip install '.[bulk]'", file=sys.stderr)
        return ExitCode.SETTINGS_WRONG
    tame_threads()
    if arguments.command == "embed":
        # Until the run listens to signals, one ends the process without a word, and not as a success.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
    if arguments.command == "configure":
        from app.commands.configure import configure

        return configure()
    if arguments.command == "demo":
        from app.commands.demo import run_demo

        configure_logging("WARNING")
        return asyncio.run(run_demo(arguments.model_path, arguments.port, arguments.once, arguments.random_weights))
    try:
        loaded = load_settings(need_key=arguments.command == "serve")
    except SettingsError as error:
        print(error, file=sys.stderr)
        return ExitCode.SETTINGS_WRONG
    settings = loaded.settings
    configure_logging(settings.log_level, settings.log_format)
    for warning in loaded.warnings:
        logging.getLogger("app").warning("%s", warning)
    # Imported once the settings have put CUDA_VISIBLE_DEVICES and the like in place.
    from app.engine.loading import load_configured_model

    load_model = partial(load_configured_model, settings, loaded.may_download)
    if arguments.command == "embed":
        from app.bulk.run import embed

        return embed(settings, options.read(arguments), load_model)
    if arguments.command == "verify":
        from app.commands.verify import verify

        return verify(settings, load_model)
    return run_server(settings, load_model)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; `command` is "serve" if none is given."""
    parser = argparse.ArgumentParser(prog="python -m app", description="Embedding server for Qwen3-VL-Embedding.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="serve over HTTP, as config.env and the environment say (the default)")
    options.add_arguments(commands.add_parser("embed", help="embed the rows of a file, or a folder of images, into a file"))
    commands.add_parser("verify", help="check the configured checkpoint against its published figure")
    commands.add_parser("configure", help="write config.env from config.env.example, with a new API key, where there is none")
    demo = commands.add_parser("demo", help="serve a checkpoint and ask it one question of every kind")
    demo.add_argument("--model-path", type=Path, required=True, help="the checkpoint's folder")
    demo.add_argument("--random-weights", action="store_true", help="say that its vectors carry no meaning")
    demo.add_argument("--port", type=int, default=6008)
    demo.add_argument("--once", action="store_true", help="end after the table; not 0 if a request failed")
    arguments = parser.parse_args()
    arguments.command = arguments.command or "serve"
    return arguments


def run_server(settings: Settings, load_model: LoadModel) -> int:
    """Serves until the end; returns the exit code."""
    from app.http.server import serve
    from app.main import create_app
    from app.process import allow_connections, freeze_heap, share_interpreter

    async def run() -> int:
        return await serve(create_app(settings, load_model, freeze_heap))

    share_interpreter()
    allow_connections()
    return asyncio.run(run())


if __name__ == "__main__":
    # Until serve() listens to signals there is nothing to drain.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(ExitCode.DRAINED))
    code = main()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as it is where it was closed before the start
            stream.flush()
    # Not sys.exit: a device's thread that is loading, or hangs, must neither keep the process nor be torn down under torch.
    os._exit(code)
