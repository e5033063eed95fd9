"""The families of the package: found by their files, known to Transformers at once, loaded when they are asked for.

A family is the file `<dense model_type>_ecmoe.py`. Its classes are called as the dense ones with EcMoe before them, its
model_type is the dense one with `ecmoe_` before it. So Transformers' own table of names says what is in which file. A
composite, which has a decoder of such a family, is the file `<dense model_type>_composite_ecmoe.py`.

Nothing is imported here that is slow: a command's --help is answered before torch and Transformers are loaded.
"""

import functools
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_PREFIX = "ecmoe_"
_SUFFIX = "_ecmoe"
_COMPOSITE_SUFFIX = "_composite_ecmoe"
_CONFIG_MODULE = "transformers.models.auto.configuration_auto"


@functools.cache
def families() -> Mapping[str, str]:
    """The dense model_type of each text family that the installed Transformers has -> how our classes of it begin, such
    as "EcMoeLlama"."""
    return _prefixes(_SUFFIX)


@functools.cache
def composites() -> Mapping[str, str]:
    """The same of composites, which read images or sound too: "gemma3" -> "EcMoeGemma3"."""
    return _prefixes(_COMPOSITE_SUFFIX)


def _prefixes(suffix: str) -> dict[str, str]:
    dense_configs: dict[str, str] = importlib.import_module(_CONFIG_MODULE).CONFIG_MAPPING_NAMES
    files = [file.name for file in pkgutil.iter_modules([str(Path(__file__).parent)]) if file.name.endswith(suffix)]
    found = sorted(file.removesuffix(suffix) for file in files)
    return {dense: "EcMoe" + dense_configs[dense].removesuffix("Config") for dense in found if dense in dense_configs}


def class_endings(is_composite: bool = False) -> list[str]:
    """How the classes of a family, or of a composite, end that are found by their names."""
    from .configuration_ecmoe import AUTO_CLASSES, COMPOSITE_AUTO_CLASSES

    heads = COMPOSITE_AUTO_CLASSES if is_composite else AUTO_CLASSES
    return ["Config", "PreTrainedModel", *dict.fromkeys(heads.values())]


def config_class(dense_model_type: str) -> Any:
    """The config class of a family, named by the dense model_type such as "qwen3"."""
    return _class_of(dense_model_type, "Config")


def model_class(model_type: str, auto_class: str = "AutoModelForCausalLM") -> Any:
    """The model class of a family for an Auto class, the family named by its own model_type or the dense one."""
    from .configuration_ecmoe import AUTO_CLASSES, COMPOSITE_AUTO_CLASSES

    dense = model_type.removeprefix(_PREFIX)
    return _class_of(dense, (COMPOSITE_AUTO_CLASSES if dense in composites() else AUTO_CLASSES)[auto_class])


def auto_class_of(config: Any) -> str:
    """The Auto class that makes the whole language model of a config, with what it reads beside text."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    has_more = hasattr(config, "text_config") and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return "AutoModelForImageTextToText" if has_more else "AutoModelForCausalLM"


def class_named(name: str) -> Any:
    """The class of that name, such as EcMoeQwen3ForCausalLM; None where no family has one."""
    if name.startswith("EcMoe"):
        for known, endings in ((families(), class_endings()), (composites(), class_endings(is_composite=True))):
            for dense, prefix in known.items():
                if name.startswith(prefix) and name.removeprefix(prefix) in endings:
                    return _class_of(dense, name.removeprefix(prefix))
    return None


def _class_of(dense_model_type: str, ending: str) -> Any:
    is_composite = dense_model_type in composites()
    suffix, prefixes = (_COMPOSITE_SUFFIX, composites()) if is_composite else (_SUFFIX, families())
    family = importlib.import_module(f".{dense_model_type}{suffix}", __package__)
    return getattr(family, prefixes[dense_model_type] + ending)


def register_all() -> None:
    """Makes every family known to AutoConfig, which leads to its file, and that to its models: now if Transformers'
    Auto classes are loaded, otherwise as soon as they are."""
    if _CONFIG_MODULE in sys.modules:  # also while another thread loads it, which the import waits for
        module = importlib.import_module(_CONFIG_MODULE)
        if hasattr(module, "AutoConfig"):
            _register(module)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Waits for Transformers' Auto classes, and is gone once the families are registered with them."""

    is_asking = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _CONFIG_MODULE or self.is_asking:
            return None
        self.is_asking = True  # the others, among which this one is
        try:
            spec = find_spec(name)
        finally:
            self.is_asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Another loader, after whose work the families are registered."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):  # of a copy that has none yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module)


def _register(module: ModuleType) -> None:
    """Transformers has no public way to register a class that is not loaded yet. Where its mapping is built otherwise
    than now, the classes are loaded at once and registered in the public way."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Watch)]
    registered = getattr(module.CONFIG_MAPPING, "_extra_content", None)
    if type(registered) is dict:
        others = {name: config for name, config in registered.items() if _dense_of(name) is None}  # of remote code
        module.CONFIG_MAPPING._extra_content = _LoadedWhenAskedFor(others)
    elif not isinstance(registered, _LoadedWhenAskedFor):
        for dense in (*families(), *composites()):
            module.AutoConfig.register(f"{_PREFIX}{dense}", config_class(dense), exist_ok=True)


class _LoadedWhenAskedFor(dict[str, Any]):
    """The config classes registered with AutoConfig; those of our families are loaded by the first that asks."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or _dense_of(model_type) is not None

    def keys(self) -> Any:
        return [
            *super().keys(),
            *(name for name in _own_model_types() if not super(type(self), self).__contains__(name)),
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __missing__(self, model_type: str) -> Any:
        dense = _dense_of(model_type)
        if dense is None:
            raise KeyError(model_type)
        self[model_type] = config_class(dense)
        return self[model_type]


def is_own(config: Any) -> bool:
    """Whether a config is of a family or composite of ours, those of a newer Transformers among them."""
    return str(config.model_type).startswith(_PREFIX)


def _own_model_types() -> list[str]:
    return [f"{_PREFIX}{dense}" for dense in (*families(), *composites())]


def _dense_of(model_type: object) -> str | None:
    """The dense model_type of one of our families' own; None of any other."""
    if not isinstance(model_type, str) or not model_type.startswith(_PREFIX):
        return None
    dense = model_type.removeprefix(_PREFIX)
    return dense if dense in families() or dense in composites() else None
