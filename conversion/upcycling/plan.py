"""What will be written: the config and, for every tensor of the expert-choice model, where it comes from.

A plan is made from configs and shard headers alone; no weights are read before its tensors are asked for.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

import modeling_ecmoe
from modeling_ecmoe.configuration_ecmoe import EcMoeConfigMixin
from modeling_ecmoe.names_ecmoe import layer_number

from ..checkpoints.locate import last_line
from ..checkpoints.source import DTYPES, Source, is_unread, with_prefix
from ..checkpoints.writer import PlannedTensor
from ..errors import ConversionError
from ..models import tied_tensors
from .composites import BUILDING_ERRORS, as_in_memory, decoder_name, is_passed_over, refuse_composite
from .dense import Part, ffn_parts, ffn_width, parts_of_stack
from .initialisations import ExpertMatrix, config_fields, normal, num_shared_neurons
from .mixtures import KEPT, MIXTURES, MixtureMaker
from .mixtures import complete as complete_mixture
from .mixtures import config_fields as mixture_fields
from .refusals import why_not
from .settings import Settings

# What may differ between the configs of checkpoints that are mixed.
_FREE_FIELDS = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"}
# What only this family reads; the conversion's options and initialisation set it.
_EXPERT_CHOICE_FIELDS = [field.name for field in dataclasses.fields(EcMoeConfigMixin)] + ["num_experts_per_tok"]


@dataclass(frozen=True)
class Plan:
    """config: of the decoder, which is the whole model where it reads text alone. model: on the meta device, for names,
    shapes and code; its config is what is saved. router_rows: measured ones by tensor name; the tensors
    not in it are drawn. Filled before anything is written. mixture: the source's model_type where it is a mixture of
    experts already; None of a dense one."""

    settings: Settings
    config: PreTrainedConfig
    dtype: torch.dtype
    model: PreTrainedModel
    sources: list[Source]
    tensors: list[PlannedTensor]
    router_rows: dict[str, Tensor]
    mixture: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the converted model computes what its source computes."""
        if self.mixture is not None:
            return self.settings.routing == "token_choice"
        return self.settings.initialisation.exact

    @property
    def tied(self) -> dict[str, str]:
        """The tensors that are another one and not in the file, and which one each is."""
        return tied_tensors(self.model)

    @property
    def decoder(self) -> str:
        """The name of the decoder in the model: "model", or of a composite "model.language_model"."""
        return decoder_name(self.model)

    @property
    def is_composite(self) -> bool:
        return self.model.config is not self.config

    @property
    def layers(self) -> str:
        """The name of the decoder's layers in the model."""
        config: Any = self.config
        return f"{self.decoder if self.is_composite else self.model.base_model_prefix}.{config.dense_ffn.layers}"

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_conversion(sources: list[Source], settings: Settings) -> Plan:
    """Plans a conversion; the first source gives config, tokenizer and dtype.

    Raises:
        ConversionError: for an unsupported family, a wrong option, or tensors that do not fit the config.
    """
    dense_configs = [read_dense_config(source, settings.text_only) for source in sources]
    for source, config in zip(sources[1:], dense_configs[1:], strict=True):
        _check_same_architecture(sources[0], dense_configs[0], source, config)
    for source in sources:
        _check_dtypes(source)
    dense_config = dense_configs[0]
    text_config = dense_config.get_text_config()
    mixture = text_config.model_type if text_config.model_type in MIXTURES else None
    if mixture is None:
        settings = settings.complete(text_config, len(sources))
    elif len(sources) > 1:
        raise ConversionError(f"mix_with takes dense checkpoints, and the source is a {mixture}; leave it out")
    else:
        settings = complete_mixture(settings, text_config)
    config = _config(text_config, sources[0].dtype, settings)
    whole = config if text_config is dense_config else _whole_config(dense_config, config)
    try:
        with torch.device("meta"):
            model = modeling_ecmoe.model_class(whole.model_type)(whole)
            auto_class = getattr(transformers, modeling_ecmoe.auto_class_of(dense_config))
            dense = auto_class.from_config(dense_config)
    except BUILDING_ERRORS as error:
        raise ConversionError(
            f"{sources[0].config_place} describes no model that can be built: {last_line(error)}"
        ) from error
    for source in sources:
        source.headers = with_prefix(source.headers, model.base_model_prefix)
    plan = Plan(settings, config, sources[0].dtype, model, sources, [], {}, mixture)
    maker: Any
    if mixture is None:
        maker = _Maker(plan, {name: tuple(tensor.shape) for name, tensor in dense.state_dict().items()})
    else:
        maker = MixtureMaker(mixture, sources[0])
    plan.tensors.extend(maker.plan(name, like) for name, like in model.state_dict().items() if name not in plan.tied)
    if whole is not config:
        aside = (n for n in sources[0].headers if is_passed_over(n, model) and not is_unread(n))
        plan.tensors.extend(_kept_aside(sources[0], name) for name in aside)
    for source in sources:
        _check_tensors(plan, source)
    return plan


def read_dense_config(source: Source, text_only: bool = False) -> PreTrainedConfig:
    """A source's config, if it is of a family that can be converted; of a composite its tensors get the names that
    they have in memory, and with text_only it is the decoder that is converted."""
    path, fields = source.config_place, source.config_fields()
    model_type = fields.get("model_type")
    if isinstance(model_type, str) and model_type.startswith("ecmoe_"):
        raise ConversionError(f"source={source.place} is an expert-choice checkpoint already; give the dense one")
    kind = model_type if isinstance(model_type, str) else ""
    has_parts = isinstance(fields.get("text_config"), dict) and kind in CONFIG_MAPPING
    if has_parts or kind in modeling_ecmoe.composites():
        refuse_composite(source, fields, text_only)
        whole: Any = source.config()
        _refuse_decoder(whole.get_text_config().to_dict(), path)
        return as_in_memory(source, whole, text_only)
    if text_only:
        raise ConversionError(
            f"text_only=True (--text-only) is of a model that reads more than text, and model_type={model_type} does "
            "not; leave it out"
        )
    if not isinstance(model_type, str) or model_type not in {*modeling_ecmoe.families(), *MIXTURES}:
        raise ConversionError(f"model_type={model_type} is not supported: {why_not(fields)}")
    _refuse_decoder(fields, path)
    config: PreTrainedConfig = source.config()
    return config


def _refuse_decoder(fields: dict[str, Any], path: str) -> None:
    """What no family can express of the fields of a decoder's config."""
    if fields.get("enable_moe_block"):
        raise ConversionError(
            f"enable_moe_block=True in {path}: a {fields.get('model_type')} with experts beside its FFNs; convert one "
            "without"
        )
    if fields.get("use_bidirectional_attention") in (True, "all"):  # Gemma-4's "vision" is causal in text
        raise ConversionError(
            f"use_bidirectional_attention={fields['use_bidirectional_attention']} in {path}: its tokens see later "
            "ones, and only causal decoders can be converted; give one of those"
        )
    if fields.get("add_cross_attention"):
        raise ConversionError(
            f"add_cross_attention=True in {path}: its layers look at an encoder, and only decoders by themselves can "
            "be converted; give one of those"
        )
    for name in ("dtype", "torch_dtype"):
        if fields.get(name) and not isinstance(getattr(torch, str(fields[name]), None), torch.dtype):
            raise ConversionError(
                f"{path}: {name}={fields[name]} is no torch dtype; write float32, bfloat16 or float16"
            )


def _config(dense: PreTrainedConfig, dtype: torch.dtype, settings: Settings) -> PreTrainedConfig:
    fields = dense.to_dict()
    # Some dense files carry a mixture's fields, which their own class passes over.
    for name in ("model_type", "architectures", "auto_map", "transformers_version", *_EXPERT_CHOICE_FIELDS):
        fields.pop(name, None)
    family = dense.model_type
    if settings.init == KEPT:
        family = MIXTURES[dense.model_type].family
        for name in MIXTURES[dense.model_type].own_fields:
            fields.pop(name, None)
        fields |= mixture_fields(dense, settings)
    else:
        fields |= config_fields(settings.initialisation, ffn_width(dense), settings.ratio, settings.num_shards)
        fields |= {
            "num_experts": settings.num_experts,
            "capacity_factor": settings.capacity_factor,
            "mlp_layer_types": settings.mlp_layer_types(dense.num_hidden_layers),
        }
    try:
        config = modeling_ecmoe.config_class(family)(**fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConversionError(last_line(error).removeprefix("ValueError: ")) from error
    config.dtype = dtype
    config.architectures = [modeling_ecmoe.model_class(config.model_type).__name__]
    return config


def _whole_config(dense: PreTrainedConfig, text: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a composite: the dense one with the decoder's config in its place."""
    fields = dense.to_dict() | {"text_config": text, "tie_word_embeddings": dense.tie_word_embeddings}
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        fields.pop(name, None)
    whole: PreTrainedConfig = modeling_ecmoe.config_class(dense.model_type)(**fields)
    whole.dtype = text.dtype
    whole.architectures = [modeling_ecmoe.model_class(whole.model_type).__name__]
    return whole


def _kept_aside(source: Source, name: str) -> PlannedTensor:
    """A tensor that no class of Transformers reads and other tools do, such as a head that predicts further tokens."""
    header = source.headers[name]
    dtype = DTYPES[header.dtype]
    return PlannedTensor(
        name, header.shape, dtype, lambda: source.pieces(name, checked=False), {name: header.shape}, name
    )


class _Maker:
    """Plans the tensors of the expert-choice model one by one."""

    def __init__(self, plan: Plan, dense_shapes: dict[str, tuple[int, ...]]) -> None:
        self.plan_ = plan
        self.dense_shapes = dense_shapes
        self.config: Any = plan.config
        self.settings = plan.settings
        self.sources = plan.sources

    def plan(self, name: str, like: Tensor) -> PlannedTensor:
        """Where the tensor of that name comes from, and how."""
        number: Any = layer_number(name)
        is_one = len(self.sources) == 1 or self.settings.mix_attention == "first"
        if ".mlp.gate." in name:
            dtype = self.plan_.dtype if name.endswith("gate.weight") else like.dtype
            return PlannedTensor(name, tuple(like.shape), dtype, lambda: iter([self._router(name, like)]))
        if ".mlp.experts." in name:
            layer, _, stacked = name.partition("mlp.experts.")
            if stacked.startswith("act_fn."):  # of an activation that learns; the experts of a layer share it
                dense = f"{layer}{self.config.dense_ffn.place}.{stacked}"
                return self._planned(name, like, [dense], lambda: self._verbatim(dense), is_one)
            parts = parts_of_stack(self.config, number, stacked)
            return self._planned(
                name, like, [layer + part.tensor for part in parts], lambda: self._experts(layer, number, parts)
            )
        if ".mlp.shared_expert." in name:
            layer, _, tensor = name.partition("mlp.shared_expert.")
            if tensor.startswith("act_fn."):
                dense = f"{layer}{self.config.dense_ffn.place}.{tensor}"
                return self._planned(name, like, [dense], lambda: self._verbatim(dense), is_one)
            parts = [part for part in ffn_parts(self.config, number) if part.shared == tensor]
            is_same = self.settings.initialisation.shares == "all" and not parts[0].is_transposed
            whole = layer + parts[0].tensor
            return self._planned(name, like, [whole], lambda: self._shared(layer, number, parts), is_same)
        return self._planned(name, like, [name], lambda: self._verbatim(name), is_one)

    def _planned(
        self,
        name: str,
        like: Tensor,
        read: list[str],
        pieces: Callable[[], Iterator[Tensor]],
        is_same: bool = False,
    ) -> PlannedTensor:
        """read: the dense tensors that it is made of. is_same: it is the first of them."""
        header = self.sources[0].headers.get(read[0])
        dtype = DTYPES[header.dtype] if header else self.plan_.dtype
        sources = {name: self.dense_shapes[name] for name in read}
        return PlannedTensor(name, tuple(like.shape), dtype, pieces, sources, read[0] if is_same else None)

    def _verbatim(self, name: str) -> Iterator[Tensor]:
        """The tensor as it is, or the mean of all sources, in blocks of rows."""
        sources = self.sources if self.settings.mix_attention == "average" else self.sources[:1]
        # A tower may hold what is not finite and be whole: bounds that were never set.
        in_decoder = name.startswith(f"{self.plan_.decoder}.") or name == "lm_head.weight"
        checked = in_decoder or not self.plan_.is_composite
        for blocks in zip(*(source.pieces(name, checked) for source in sources), strict=True):
            if len(blocks) == 1:
                yield blocks[0]
            else:
                yield torch.stack([block.float() for block in blocks]).mean(0).to(blocks[0].dtype)

    def _experts(self, layer: str, number: int, parts: list[Part]) -> Iterator[Tensor]:
        """Expert after expert, its parts in turn."""
        dense = [[_read(source, layer, part) for part in parts] for source in self.sources]
        for expert in range(self.config.num_experts):
            for part, matrix in zip(parts, dense[expert % len(dense)], strict=True):
                wanted = ExpertMatrix(
                    part,
                    expert,
                    lambda label, key=f"{layer}mlp.experts.{expert}": generator_of(
                        self.settings.seed, f"{key}:{label}"
                    ),
                    self.settings.ratio or 0,
                    self.settings.num_shards,
                    self.config.ffn_width_multiple(number),
                )
                yield self.settings.initialisation.expert(wanted, matrix)

    def _shared(self, layer: str, number: int, parts: list[Part]) -> Iterator[Tensor]:
        """The parts of one tensor of the shared expert: all neurons, or the first ones."""
        width = self.config.intermediate_size
        if self.settings.initialisation.shares == "ratio":
            width = num_shared_neurons(width, self.settings.ratio or 0)
        width *= self.config.ffn_width_multiple(number)
        for part in parts:
            dense = _read(self.sources[0], layer, part)
            yield dense if part.neuron_axis is None else dense.narrow(part.neuron_axis, 0, width)

    def _router(self, name: str, like: Tensor) -> Tensor:
        """Measured rows, or rows from N(0, initializer_range), each tensor from a seed of its own; the shards of one
        replica share a row. Threshold buffers start at zero and are set once the weights are known."""
        if not name.endswith("gate.weight"):
            return torch.zeros(like.shape, dtype=like.dtype, device="cpu")
        granularity = self.settings.num_shards
        if name in self.plan_.router_rows:
            rows = self.plan_.router_rows[name]
        else:
            shape = (like.shape[0] // granularity, like.shape[1])
            rows = normal(shape, generator_of(self.settings.seed, name)) * self.config.initializer_range
        return rows.repeat_interleave(granularity, dim=0).to(self.plan_.dtype)


def _read(source: Source, layer: str, part: Part) -> Tensor:
    if part.is_transposed:  # never fused, so it is the whole tensor
        return source.read(layer + part.tensor).T
    return source.read(layer + part.tensor, part.first_row, part.first_row + part.num_rows)


def generator_of(seed: int, key: str) -> torch.Generator:
    """A generator of one tensor's own, so that neither order nor interruption changes what is drawn."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))


def _check_same_architecture(
    first: Source, first_config: PreTrainedConfig, other: Source, other_config: PreTrainedConfig
) -> None:
    ours, theirs = first_config.to_dict(), other_config.to_dict()
    for name in sorted((ours.keys() | theirs.keys()) - _FREE_FIELDS):
        if ours.get(name) != theirs.get(name):
            raise ConversionError(
                f"init=mix needs checkpoints of one architecture: {name}={theirs.get(name)} in {other.source} and "
                f"{ours.get(name)} in {first.source}"
            )


def _check_dtypes(source: Source) -> None:
    for name, header in source.headers.items():
        if header.dtype not in DTYPES and not is_unread(name):
            raise ConversionError(
                f"{name} of {source.source} has dtype {header.dtype}; only float32, bfloat16 and float16 can be "
                "converted"
            )


def _is_beyond(name: str, config: Any) -> bool:
    """Whether a tensor is of a layer that the config does not count."""
    number = layer_number(name)
    return number is not None and number >= config.num_hidden_layers


def _check_tensors(plan: Plan, source: Source) -> None:
    """Every tensor that the plan reads is there, in the size and dtype that it counts on, and there is no other."""
    expected = {name: shape for tensor in plan.tensors for name, shape in tensor.sources.items()}
    source.check(expected)
    for name in expected:
        header = source.headers[name]
        if header.dtype != plan.sources[0].headers[name].dtype:
            raise ConversionError(
                f"{name} has dtype {header.dtype} in {source.source} and {plan.sources[0].headers[name].dtype} in "
                f"{plan.sources[0].source}; save both in one dtype"
            )
    for tensor in plan.tensors:
        dtypes = {source.headers[name].dtype for name in tensor.sources}
        if len(dtypes) > 1:
            raise ConversionError(f"{' and '.join(tensor.sources)} have dtypes {' and '.join(sorted(dtypes))}; use one")
    unused = sorted(n for n in source.headers.keys() - expected.keys() - plan.tied.keys() if not is_unread(n))
    if plan.mixture is not None:  # layers after the last predict tokens further ahead, and Transformers reads none
        unused = [name for name in unused if not _is_beyond(name, plan.config)]
    if unused:
        kind = plan.mixture or f"dense {plan.model.config.model_type.removeprefix('ecmoe_')}"
        raise ConversionError(
            f"source={source.place} holds {unused[0]} ({len(unused)} such tensors), which a {kind} model of this "
            "config does not have; convert a plain one"
        )
