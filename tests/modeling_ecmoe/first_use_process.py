"""What a process without the package meets: `first_use_process.py FOLDER`, a saved model and its tokenizer.

Prints what an older Transformers is told, by the package and by the folder's own code, and then loads model and
tokenizer.
"""

import sys

from transformers import LlamaForCausalLM  # noqa: F401  with it all that a family imports


def refusal(load: object) -> str:
    try:
        load()
    except ImportError as error:
        return str(error)
    return "nothing"


def forget(*names: str) -> None:
    """As if these packages had not been imported, and could not be."""
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]
    for name in names:
        sys.modules[name] = None


def main() -> None:
    folder = sys.argv[1]
    transformers = sys.modules["transformers"]
    version = transformers.__version__
    transformers.__version__ = "4.57.1"
    import modeling_ecmoe

    print(refusal(lambda: modeling_ecmoe.EcMoeLlamaForCausalLM))
    forget("modeling_ecmoe", "ecmoe")
    transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content = {}

    def load_config() -> object:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)

    print(refusal(load_config))
    transformers.__version__ = version
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    print("the tokenizer", file=sys.stderr)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    print("loaded", file=sys.stderr)
    print(tokenizer.decode(tokenizer("this text")["input_ids"]))
    assert type(load_config()) is type(model.config)  # with trust it is the folder's own still
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        print(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
