"""The README's pictures, from a checkpoint and a text of your own: `make pictures CHECKPOINT=... TEXT=...`.

Writes report.html, report.png (its first screen, through a headless Chromium) and expert-choice.png (expert choice by
hand).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ecmoe
from ecmoe.analysis import AnalysisError


def main() -> None:
    parser = argparse.ArgumentParser(prog="pictures", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="expert-choice checkpoint folder or Hub id")
    parser.add_argument("text", help="UTF-8 file, at most as long as the model's context")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder to write to (default: docs)")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("pictures: error: there is no chromium on the PATH; install it (Debian: chromium)", file=sys.stderr)
        sys.exit(2)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        ecmoe.report(options.checkpoint, str(options.output / "report.html"), text_file=options.text)
        ecmoe.draw(output=str(options.output / "expert-choice.png"))
        screenshot(chromium, options.output / "report.html", options.output / "report.png")
    except (AnalysisError, OSError, subprocess.SubprocessError) as error:
        print(f"pictures: error: {error}", file=sys.stderr)
        sys.exit(2)


def screenshot(chromium: str, page: Path, picture: Path) -> None:
    """The first 1200 x 900 pixels of a page on this disk.

    Raises:
        subprocess.SubprocessError: when Chromium fails, or takes more than a minute.
    """
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium,
            "--headless=new",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            "--window-size=1200,900",
            f"--user-data-dir={profile}",
            f"--screenshot={picture.resolve()}",
            page.resolve().as_uri(),
        ]
        if os.geteuid() == 0:  # its sandbox refuses root, as in containers
            command.insert(1, "--no-sandbox")
        subprocess.run(command, check=True, timeout=60, capture_output=True)


if __name__ == "__main__":
    main()
