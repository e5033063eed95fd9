"""The pictures of the pages, from a checkpoint and a text of your own: `make pictures CHECKPOINT=... TEXT=...`.

Writes report.html, report.png (its first screen, through a headless Chromium), expert-choice.png (expert choice by
hand) and choices.png (token choice beside it).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import ecmoe
from ecmoe.analysis import AnalysisError
from ecmoe.analysis.drawing import TOKEN_COLOURS
from ecmoe.analysis.walkthrough import walk_through


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
        draw_choices(options.output / "choices.png")
        screenshot(chromium, options.output / "report.html", options.output / "report.png")
    except (AnalysisError, OSError, subprocess.SubprocessError) as error:
        print(f"pictures: error: {error}", file=sys.stderr)
        sys.exit(2)


def draw_choices(path: Path) -> None:
    """Token choice and expert choice side by side: the scores of `ecmoe-inspect draw`, who takes whom, the loads."""
    walk = walk_through(num_experts=3, top=2, seed=0, matrices=None)
    num_tokens, num_experts = walk.scores.shape
    by_tokens = torch.zeros_like(walk.scores, dtype=torch.bool).scatter(1, walk.chosen_experts, True)
    by_experts = torch.zeros_like(by_tokens).T.contiguous().scatter(1, walk.index, True).T
    titles = ("Token choice: each token takes its best expert", "Expert choice: each expert takes its best two tokens")
    figure = Figure(figsize=(9.6, 3.9), dpi=130, layout="constrained")
    for axes, chosen, title in zip(figure.subplots(1, 2), (by_tokens, by_experts), titles, strict=True):
        for token in range(num_tokens):
            for expert in range(num_experts):
                colour = TOKEN_COLOURS[token] if chosen[token, expert] else "#f1f3f5"
                axes.add_patch(Rectangle((expert, -token), 0.94, 0.9, facecolor=colour))
                text = f"{walk.scores[token, expert]:.2f}"
                weight = "bold" if chosen[token, expert] else "normal"
                axes.text(expert + 0.47, 0.45 - token, text, ha="center", va="center", fontsize=9, weight=weight)
        for expert, load in enumerate(chosen.sum(0).tolist()):
            words = f"{load} token{'s' * (load != 1)}"
            axes.text(expert + 0.47, -num_tokens + 0.35, words, ha="center", va="center", fontsize=10, weight="bold")
        axes.set(xlim=(0, num_experts), ylim=(0.1 - num_tokens, 1))
        axes.set_title(title, fontsize=11)
        axes.set_xticks([expert + 0.47 for expert in range(num_experts)], [f"expert {e}" for e in range(num_experts)])
        axes.set_yticks([0.45 - token for token in range(num_tokens)], [f"token {t}" for t in range(num_tokens)])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.savefig(path, facecolor="white")


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
