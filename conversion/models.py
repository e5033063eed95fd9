"""Models that are run: loaded from a folder, and held against each other on the same tokens."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ecmoe.progress import gigabytes, progress_bar

from .errors import ConversionError

NUM_GREEDY_TOKENS = 40
# Exact in float32 up to rounding; in 16 bits the two sums round differently.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def tied_tensors(model: PreTrainedModel) -> dict[str, str]:
    """The tensors of a model that are another one and not in its file, and which one each is."""
    return dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}


def check_memory(nbytes: int, device: str | None, options: str, remedy: str) -> None:
    """Memory for the models that will be run, where they run on the CPU.

    Raises:
        ConversionError: naming the options that ask for it, with what is needed and what is there.
    """
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if device == "auto" or on_gpu:
        return
    import psutil  # `upcycle` runs where only torch and Transformers are

    available = psutil.virtual_memory().available
    if nbytes > available:
        raise ConversionError(
            f"{options}: the models that are run need {gigabytes(nbytes)} of memory and {gigabytes(available)} "
            f"are free; say {remedy}, or device=auto to run them off the disk"
        )


def load_model(model_class: Any, folder: Path, dtype: torch.dtype, device: str | None, config: Any) -> Any:
    """The model of a folder in eval mode; `config` is used where the folder has no config.json yet.

    Raises:
        ConversionError: when the device is unknown or cannot hold it.
    """
    kwargs: dict[str, Any] = {} if (folder / "config.json").is_file() else {"config": config}
    try:
        if device == "auto":
            return model_class.from_pretrained(folder, dtype=dtype, device_map="auto", **kwargs).eval()
        model: Any = model_class.from_pretrained(folder, dtype=dtype, **kwargs)
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConversionError(f"device={device} is unknown here or cannot hold the model: {reason}") from error


@torch.no_grad()
def side_by_side(
    models: dict[str, Any],
    windows: dict[str, Tensor],
    batch_size: int,
    around: Callable[[str], AbstractContextManager[Any]] = lambda kind: nullcontext(),
) -> dict[str, Any]:
    """Next-token loss of each of two models, the change from the first to the second, and KL(first || second), all in
    nats per token, on windows [W, L] of each kind of text. The keys hold the models' names; `kinds` the same figures
    for each kind, where there are several.

    around: opened, with the kind of text, around each pass of the second model.
    """
    first, second = models.values()
    totals = {kind: torch.zeros(3, dtype=torch.float64) for kind in windows}
    num_batches = sum(-(-len(held) // batch_size) for held in windows.values())
    with progress_bar(total=num_batches, desc="Verifying", unit="batch") as bar:
        for kind, held in windows.items():
            for batch in held.split(batch_size):
                totals[kind] += _losses(first, second, batch, functools.partial(around, kind)) * len(batch)
                bar.update()
    figures = {kind: _figures(totals[kind], list(models), held) for kind, held in windows.items()}
    whole = _figures(torch.stack(list(totals.values())).sum(0), list(models), torch.cat(list(windows.values())))
    return whole | ({"kinds": figures} if len(figures) > 1 else {})


def _figures(totals: Tensor, names: list[str], windows: Tensor) -> dict[str, Any]:
    """The sums over windows [W, L] of both losses and the divergence as means, by name."""
    loss_first, loss_second, divergence = (totals / len(windows)).tolist()
    return {
        "tokens": windows.numel(),
        f"loss_{names[0]}": loss_first,
        f"loss_{names[1]}": loss_second,
        "loss_change": loss_second - loss_first,
        "kl_divergence": divergence,
    }


def greedy_texts(models: dict[str, Any], tokenizer: Any, windows: Tensor) -> dict[str, Any]:
    """What each of two models makes of the beginning of the first window, and whether it is the same."""
    prompt = windows[:1, : min(32, windows.shape[1] // 2)]
    with progress_bar(total=len(models) * NUM_GREEDY_TOKENS, desc="Greedy text", unit="token") as bar:
        ids = {name: greedy_ids(model, prompt, bar) for name, model in models.items()}
    first, second = ids.values()
    texts = {f"greedy_{name}": tokenizer.decode(found, skip_special_tokens=True) for name, found in ids.items()}
    return {
        "greedy_same": first == second,
        "greedy_prompt": tokenizer.decode(prompt[0], skip_special_tokens=True),
    } | texts


def _losses(first: Any, second: Any, batch: Tensor, around: Callable[[], AbstractContextManager[Any]]) -> Tensor:
    """[3] float64: both next-token losses of a batch [B, L], and the divergence KL(first || second)."""
    logits_first = first(input_ids=batch.to(first.device), use_cache=False).logits
    with around():
        logits_second = second(input_ids=batch.to(second.device), use_cache=False).logits
    sums = torch.zeros(3, dtype=torch.float64)
    # A window at a time: what lies between is as large as the logits.
    for p_SV, q_SV, ids_L in zip(logits_first, logits_second, batch, strict=True):
        log_p, log_q = (values[:-1].to(logits_first.device).float().log_softmax(-1) for values in (p_SV, q_SV))
        targets = ids_L[1:].to(log_p.device)
        losses = [
            nn.functional.nll_loss(values, targets, reduction="none").double().mean() for values in (log_p, log_q)
        ]
        divergence = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().mean()
        sums += torch.stack([*losses, divergence]).cpu()
    return sums / len(batch)


class _Ticks(BaseStreamer):
    """Moves a bar by one for each token that is generated."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.is_prompt = bar, True

    def put(self, value: Tensor) -> None:
        if not self.is_prompt:
            self.bar.update()
        self.is_prompt = False

    def end(self) -> None:
        pass


def greedy_ids(model: Any, prompt: Tensor, bar: Any) -> list[int]:
    """Greedy continuation of prompt [1, P] by a fixed number of tokens, without the prompt."""
    own = model.generation_config
    # In its place, for generate() takes from it what is not given: samples, beams, stop strings, another output.
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=NUM_GREEDY_TOKENS,
        min_new_tokens=NUM_GREEDY_TOKENS,
        **{name: getattr(own, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    )
    mask = torch.ones_like(prompt, device=model.device)
    try:
        ids = model.generate(prompt.to(model.device), attention_mask=mask, streamer=_Ticks(bar))
    finally:
        model.generation_config = own
    return ids[0, prompt.shape[1] :].tolist()
