"""Documents packed into one row, for token mixers that carry a state from token to token.

Transformers' attention tells packed documents apart by position_ids that begin again. Its linear attention and its
short convolutions do not: without a kernel that is told where documents begin, the state of one runs into the next.
Here such a mixer sees every document as a row of a batch of its own.

Shapes: B batch, S sequence, D hidden size, N documents of at most L tokens.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def lengths_of_documents(
    inputs: Tensor, position_ids: Tensor | None, attention_mask: Any, cache: Any
) -> list[int] | None:
    """The lengths of the documents of all rows, one after the other; None where each row is one document.

    inputs: [B, S, ...]. position_ids: [B or 1, S], or [4, B, S] whose first are those of the text. Read as Transformers
    reads them: with a mask of padding or a cache they say nothing of documents.

    Raises:
        ValueError: in a compiled model, which cannot ask for as many rows as there are documents.
    """
    if position_ids is None or attention_mask is not None or cache is not None:
        return None
    if position_ids.ndim == 3:
        if position_ids.shape[0] != 4:
            return None
        position_ids = position_ids[0]
    if torch.compiler.is_compiling():
        raise ValueError(
            "position_ids without an attention_mask may pack documents into a row, which a compiled model with linear "
            "attention or convolutions cannot keep apart: leave torch.compile or packing out"
        )
    is_first = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    is_first[:, 1:] = (position_ids.diff(dim=-1) != 1).to(inputs.device)
    if not bool(is_first[:, 1:].any()):
        return None
    starts = is_first.flatten().nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], is_first.numel()], strict=True)]


@contextlib.contextmanager
def tell_documents(layer: nn.Module, lengths: list[int], cache: Any) -> Iterator[None]:
    """Tells the token mixers of a decoder layer how long the documents are.

    Raises:
        ValueError: where a cache is filled, which holds a state a row.
    """
    if cache is not None:
        raise ValueError("position_ids pack several documents into a row, which fill no cache: give use_cache=False")
    mixers = [module for module in layer.children() if isinstance(module, ByDocument)]
    for mixer in mixers:
        mixer.document_lengths = lengths
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.document_lengths = None


class ByDocument:
    """A token mixer with a state, which sees each document by itself where there are several in a row."""

    document_lengths: list[int] | None = None  # set for the time of a call

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [B, S, D] -> [B, S, D]; padding on the right changes nothing before it."""
        lengths = self.document_lengths
        if lengths is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        # The boundaries that a collator counts for kernels are those of the rows.
        kwargs = {name: value for name, value in kwargs.items() if name not in _BOUNDARIES}
        rows_NLD = pad_sequence(list(hidden_states.flatten(0, 1).split(lengths)), batch_first=True)
        mixed_NLD = super().forward(rows_NLD, *args, **kwargs)  # type: ignore[misc]
        return torch.cat([row[:length] for row, length in zip(mixed_NLD, lengths, strict=True)]).view_as(hidden_states)


_BOUNDARIES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
