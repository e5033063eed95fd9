"""The tokenizer of a written folder: the ids of the source's, whatever files that one loads from; and its processor."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig, ProcessorMixin

from ..errors import ConversionError
from .folder import Checkpoint
from .source import Source

# What tokenizers treat differently: capitals, digits, several spaces, accents that are composed and not, scripts.
_PROBE = "The quick brown fox, 12,345 times:  caf\u00e9 cafe\u0301\n\tna\u00efve \u65e5\u672c\u8a9e \U0001f600 <s>"
_LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)


def keep_tokenizer(source: Source, folder: Path, config: PreTrainedConfig) -> None:
    """Makes sure that the folder, with this config, gives the tokenizer of the source.

    Some tokenizers load from files that Transformers finds by the model's class alone, such as a lone tekken.json; of
    these the folder gets Transformers' own form as well.

    Raises:
        ConversionError: when the source's tokenizer loads and the folder's does not or makes other ids.
    """
    try:
        wanted = source.tokenizer()
    except ConversionError:
        return  # there is none; where one is needed that was said
    if _is_same(wanted, _loaded(AutoTokenizer, folder, config)):
        return
    wanted.save_pretrained(folder)
    if not _is_same(wanted, _loaded(AutoTokenizer, folder, config)):
        raise ConversionError(
            f"source={source.place}: its tokenizer ({type(wanted).__name__}) is another one when it is loaded from the "
            "output; save it with save_pretrained in Transformers' own form and convert again"
        )


def keep_processor(source: Source, folder: Path, config: PreTrainedConfig) -> None:
    """Makes sure that the folder, with this config, gives the processor of the source, which Transformers may have
    found by the model's class alone. Where the source's cannot be made here, for want of torchvision say, its files are
    what there is."""
    if not isinstance(source, Checkpoint):
        return
    try:
        wanted = AutoProcessor.from_pretrained(source.folder)
    except _LOADING_ERRORS:
        return
    if isinstance(wanted, ProcessorMixin) and type(_loaded(AutoProcessor, folder, config)) is not type(wanted):
        wanted.save_pretrained(folder)


def _loaded(auto_class: Any, folder: Path, config: PreTrainedConfig) -> Any:
    """The tokenizer or processor of the folder as it will be once its config.json is there; None where none loads."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.copytree(path, Path(scratch) / path.name)
            elif path.suffix not in (".safetensors", ".py") and path.name != "config.json":
                shutil.copyfile(path, Path(scratch) / path.name)
        config.save_pretrained(scratch)
        try:
            return auto_class.from_pretrained(scratch)
        except _LOADING_ERRORS:
            return None


def _is_same(wanted: Any, found: Any) -> bool:
    return (
        found is not None
        and wanted.get_vocab() == found.get_vocab()
        and _ids(wanted) == _ids(found)
        and wanted.all_special_tokens == found.all_special_tokens
        and wanted.chat_template == found.chat_template
    )


def _ids(tokenizer: Any) -> list[int] | str:
    """Of the probe; where it has none, what is said: of a word, say, that a vocabulary without [UNK] has not."""
    try:
        ids: list[int] = tokenizer(_PROBE)["input_ids"]
    except Exception as error:  # tokenizers raises bare ones
        return str(error)
    return ids
