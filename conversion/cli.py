"""ecmoe-convert SRC DST: a dense checkpoint becomes an expert-choice one, or with --to that a plain one.

ecmoe-convert Qwen/Qwen3-0.6B qwen3-8x --num-experts 8 --capacity-factor 1
ecmoe-convert --to token-choice qwen3-8x-tuned qwen3-8x-plain
"""

import argparse
import logging
import sys
from typing import Any

from .arguments import check_arguments
from .checkpoints.places import local_folder
from .errors import ConversionError
from .upcycling.initialisations import INITIALISATIONS
from .upcycling.settings import NAMED_LAYERS, ROUTERS

# What needs torch is imported when there is something to convert: --help and a mistyped option are answered at once.

_DESTINATIONS_HELP = """--to, for tools that know plain classes alone; what the loss changed by is measured:
  token-choice  Mixtral (from Llama, Mistral; with dense layers Qwen2-MoE), Qwen2-MoE, Qwen3-MoE: top-k routing
  glm4-moe      GLM-4-MoE, from sigmoid scores (--init blend, shared): thresholds as biases, nearly exact"""

_OF_GLM4_MOE = "of glm4-moe four times it unless weights are normalised"


_WHICH = """  Take shared at the rates of fine-tuning (1e-5 to 1e-3; two FFNs per token), copy with --capacity-factor 2
  for long runs at higher rates (two FFNs too), granular where a token must not cost more than in the dense model."""


def _parser() -> argparse.ArgumentParser:
    words = {"shards": "G", "copies": "num_experts / G", "rest": "averaged or the first's"}
    inits = "\n".join(f"  {name:9} {init.summary.format(**words)}" for name, init in INITIALISATIONS.items())
    routers = "\n".join(f"  {name:9} {text}" for name, text in ROUTERS.items())
    ratios = "; ".join(f"{n}: {i.ratio}, {i.default_ratio}" for n, i in INITIALISATIONS.items() if i.ratio)
    parser = argparse.ArgumentParser(
        prog="ecmoe-convert",
        description="Convert a dense checkpoint, or a mixture whose tokens choose, into an expert-choice one.",
        epilog=f"initialisations:\n{inits}\n{_WHICH}\n\nrouters:\n{routers}\n\n{_DESTINATIONS_HELP}\n\n"
        "Killed or interrupted, the same command goes on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is not there: the defaults are those of the functions
    )
    parser.add_argument("source", help="folder or Hub id[@revision] of a dense checkpoint: Llama, Qwen, Gemma ...")
    parser.add_argument("destination", help="folder to make; it must not exist, or be empty")
    parser.add_argument("--num-experts", type=int, help="experts per layer (default: 8; with mix one per checkpoint)")
    parser.add_argument("--capacity-factor", type=float, help="mean experts per token (default: 1; granular: G)")
    parser.add_argument("--init", help="how experts begin, see below (default: shared)")
    parser.add_argument("--ratio", type=float, help=f"of some initialisations ({ratios})")
    parser.add_argument("--granularity", type=int, help="G, shards per dense FFN of granular (default: 2)")
    parser.add_argument("--layers", help=f"{', '.join(NAMED_LAYERS)}, or such as 1,3,5 (default: all)")
    parser.add_argument("--router", help="how the router begins, see below (default: normal)")
    parser.add_argument("--router-prompts", metavar="FILE", help="JSON list with a list of texts for each expert")
    parser.add_argument("--mix-with", nargs="+", metavar="SOURCE", help="the other checkpoints of mix")
    parser.add_argument("--mix-attention", help="average or first (default: average)")
    parser.add_argument("--text-only", action="store_true", help="of a model that reads images: its decoder alone")
    parser.add_argument("--seed", type=int, help="of everything that is drawn (default: 0)")
    parser.add_argument("--routing", help="of a mixture: expert_choice (default), threshold, or token_choice, its own")
    parser.add_argument("--min-experts-per-token", type=int, help="of a mixture (default: 1; 0 beside a shared expert)")
    parser.add_argument("--max-experts-per-token", type=int, help="of a mixture (default: no bound)")
    parser.add_argument("--max-shard-size", help="of the output's files (default: 5GB)")
    parser.add_argument("--text", help="text or .jsonl of chats to calibrate on (default: a sample of several kinds)")
    parser.add_argument("--calibration-tokens", type=int, help="of it (default: 16,384; with --to what is needed)")
    parser.add_argument("--revision", help="of a Hub id")
    parser.add_argument("--device", help="where models are run (default: an accelerator if there is one; auto: all)")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="run no model; estimate thresholds")
    parser.add_argument("--push-to-hub", metavar="REPOSITORY", help="upload the finished folder")
    parser.add_argument("--to", help="write an expert-choice checkpoint as a plain one: as what, see below")
    parser.add_argument("--num-experts-per-tok", type=int, help=f"of --to (default: the source's mean; {_OF_GLM4_MOE})")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; touch neither weights nor disk")
    parser.add_argument("--num-gpus", type=int, help="of the dry run's estimates (default: those that are here)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with code 2 and one line on an error the user can put right."""
    options = vars(_parser().parse_args(argv))
    debug, to = options.pop("debug", False), options.get("to")
    logger, warnings = logging.getLogger(__package__), _Warnings()
    logger.addHandler(warnings)
    try:
        check_arguments(options)
        _find_on_hub(options)
        from . import screen
        from .leaving.export import export
        from .upcycling.convert import convert

        _quieten()
        record = convert(**options) if to is None else export(**options)
    except ConversionError as error:
        if debug:
            raise
        print(f"ecmoe-convert: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ecmoe-convert: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        logger.removeHandler(warnings)
    if to is not None:
        screen.print_export(record, options["destination"])
    elif options.get("dry_run"):
        screen.print_plan(record, options)
    else:
        screen.print_conversion(record, options["destination"])


class _Warnings(logging.Handler):
    """What the functions log becomes a line of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"ecmoe-convert: {record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def _find_on_hub(options: dict[str, Any]) -> None:
    """A name that the Hub does not have is said before torch is loaded, which the Hub's client does without."""
    source = options["source"]
    for name in (source, *options.get("mix_with", [])):
        if local_folder(name) is None:
            from .checkpoints.locate import locate

            locate(name, options.get("revision") if name == source else None, with_weights=False)


def _quieten() -> None:
    """Bars of others are for terminals."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        disable_progress_bars()


if __name__ == "__main__":
    main()
