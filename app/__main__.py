"""`python -m app`: read the settings, and serve, or check the checkpoint."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys

from app.lifecycle import ExitCode
from app.settings import Settings, SettingsError, load_settings


def main() -> int:
    """The exit code of the command named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m app", description="Embedding server for Qwen3-VL-Embedding.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="serve over HTTP (the default)")
    commands.add_parser("verify", help="check the configured checkpoint against its published figure")
    command = parser.parse_args().command or "serve"
    try:
        settings = load_settings()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return ExitCode.SETTINGS_WRONG
    configure_logging(settings)
    if command == "verify":
        from app.verify import verify

        return verify(settings)
    return run_server(settings)


def run_server(settings: Settings) -> int:
    """Serve until the end."""
    # Imported once the settings have put CUDA_VISIBLE_DEVICES and the like in place.
    from app.main import create_app
    from app.server import serve

    async def run() -> int:
        return await serve(create_app(settings))

    return asyncio.run(run())


def configure_logging(settings: Settings) -> None:
    """One line an event on standard error."""
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # Their INFO is about every download and every file.
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "PIL"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
    for warning in settings.warnings:
        logging.getLogger("app").warning("%s", warning)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a device's thread that is loading, or hangs, must neither keep the process nor be torn down under torch.
    os._exit(code)
