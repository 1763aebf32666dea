"""How do models of Hugging Face's Transformers come to run on this package? `register`, then `attn_implementation`.

    from triton_attention.integrations import transformers as triton_attention_transformers

    triton_attention_transformers.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="triton_attention")

Two functions are registered: the one that models call for attention, and the one that makes their masks. What the mask
of a model has to say is mostly a band (causal, window), which keys are padding, and where packed sequences begin;
`BandMask` says that without a matrix. Everything else (chunks, masks of a user's own) is a matrix, a bool one, and
exact as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from inspect import getclosurevars
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers import masking_utils as library

from triton_attention.api import run
from triton_attention.problem import Inputs, Mask

NAME = "triton_attention"

# What models of some families hand to attention that changes its result, and that is not computed here.
_NOT_COMPUTED = {
    "cache": "the paged cache of continuous batching",
    "indices": "sparse attention to chosen keys",
    "block_indices": "sparse attention to chosen blocks of keys",
    "sinks": "sinks that differ between queries",
}


def register() -> None:
    """Make `attn_implementation="triton_attention"` known to Transformers; more than once does no harm.

    A model that computes attention in code of its own, and would so run without this package, is from then on refused
    with this name when it is made.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    check = PreTrainedModel.get_correct_attn_implementation
    if not hasattr(check, "__wrapped__"):
        PreTrainedModel.get_correct_attn_implementation = _refusing_own_attention(check)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(softcap(scaling * query key^T) + position_bias + attention_mask) value, as Transformers calls it.

    Args:
        module: the layer that calls; its `is_causal` counts where `is_causal` and `attention_mask` are None.
        query: (batch, heads, seqlen_q, head_dim).
        key: (batch, heads_kv, seqlen_k, head_dim), heads_kv a divisor of heads.
        value: (batch, heads_kv, seqlen_k, head_dim_v).
        attention_mask: what `attention_mask` made, or any tensor broadcastable to (batch, heads, seqlen_q, seqlen_k):
            bool, True = may attend, or an addend. None means what it does to PyTorch's SDPA in Transformers: no mask,
            or where the layer is causal and has more than one query, a causal one from the top left.
        dropout: rate at which probabilities are dropped.
        scaling: None = 1 / sqrt(head_dim).
        is_causal: see `module`.
        position_bias: an addend as T5 has it, (1 or batch, heads, seqlen_q, seqlen_k); it gets its gradient.
        softcap: bound of the scaled scores; None = none.
        s_aux: (heads,), the logits of attention sinks.
        cu_seq_lens_q: (sequences + 1,), where packed sequences begin and end in each batch entry: none sees another.
        cu_seq_lens_k: likewise, of the keys.
        kwargs: further ones are ignored, as by the library's own functions, but for those that change the result.

    Returns:
        (batch, seqlen_q, heads, head_dim_v), and None for the probabilities, which are never in memory.

    Raises:
        NotImplementedError: probabilities are asked for, or something that is not computed here, or no backend runs it.
        TypeError, ValueError: as `triton_attention.attention`.
    """
    _check_further_arguments(kwargs)
    batch, seqlen_q, seqlen_k = query.shape[0], query.shape[2], key.shape[2]
    boundaries = None
    if isinstance(attention_mask, BandMask) and attention_mask.boundaries is not None and position_bias is not None:
        attention_mask = attention_mask.matrix()  # the bias counts positions from the first sequence on
    if isinstance(attention_mask, BandMask):
        if attention_mask.shape[2:] != (seqlen_q, seqlen_k):
            raise ValueError(
                f"attention_mask must be for {seqlen_q} queries and {seqlen_k} keys, got {tuple(attention_mask.shape)}"
            )
        band, bias, boundaries = attention_mask.band, attention_mask.keys, attention_mask.boundaries
    elif attention_mask is not None:
        band, bias = Mask(), _unexpanded(attention_mask)
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        band, bias = Mask(right=0, top_left=True) if causal and seqlen_q > 1 else Mask(), None
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if cu_seq_lens_q is None or cu_seq_lens_k is None or seqlen_q != seqlen_k:
            raise ValueError(
                "cu_seq_lens_q and cu_seq_lens_k must be of the same packed sequences, with as many keys as queries, "
                f"got {cu_seq_lens_q} and {cu_seq_lens_k} for {seqlen_q} queries and {seqlen_k} keys"
            )
        if bias is not None or position_bias is not None:
            bias = _sum(_same_sequence(cu_seq_lens_q, cu_seq_lens_k, seqlen_q, seqlen_k), bias)
            cu_seq_lens_q = cu_seq_lens_k = None
    if position_bias is not None:
        bias = _sum(_unexpanded(position_bias), bias)
    inputs = Inputs(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias, sink=s_aux)
    attend = partial(run, mask=band, softmax_scale=scaling, softcap=softcap or 0.0, dropout_p=dropout)
    if boundaries is None and cu_seq_lens_q is None:
        return attend(inputs)[0], None
    packed = inputs._replace(
        q=inputs.q.flatten(0, 1),
        k=inputs.k.flatten(0, 1),
        v=inputs.v.flatten(0, 1),
        cu_seqlens_q=_all_boundaries(boundaries, cu_seq_lens_q, batch, seqlen_q),
        cu_seqlens_k=_all_boundaries(boundaries, cu_seq_lens_k, batch, seqlen_k),
    )
    out, _ = attend(packed, max_seqlen_q=seqlen_q, max_seqlen_k=seqlen_k)
    return out.unflatten(0, (batch, seqlen_q)), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = library.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `attention_forward` is to get: a `BandMask` where `mask_function` is a band, else a bool matrix.

    The arguments are those of `transformers.masking_utils.sdpa_mask`, which makes the matrix. That is done under
    `torch.compile` and `torch.export` too, but for the causal mask that is None there.

    Args:
        batch_size: the sequences of the batch.
        q_length: queries; the first has the position `q_offset`, a tensor in a static cache.
        kv_length: keys; the first has the position `kv_offset`.
        q_offset: see `q_length`.
        kv_offset: see `kv_length`.
        mask_function: (batch, head, position of query, position of key) -> may attend.
        attention_mask: (batch, positions) bool, False = padding; positions beyond its end are padding too.
        local_size: the window or chunk of `mask_function`, if it has one.
        device: where the mask is to be.
        kwargs: whatever else `sdpa_mask` takes.
    """
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "device": device,
    }
    sides, sequences = None, None
    if not torch.compiler.is_compiling():
        within, sequences = _unpacked(mask_function)
        if sequences is None or (attention_mask is None and q_length == kv_length):
            sides = _sides(within, local_size)
    if sides is None or isinstance(q_offset, Tensor) or q_offset not in (kv_offset, kv_offset + kv_length - q_length):
        matrix: Tensor | None = library.sdpa_mask(**arguments, **kwargs)
        return matrix
    band = Mask(*sides, top_left=q_offset == kv_offset)
    keys = None
    if attention_mask is not None:
        missing = kv_offset + kv_length - attention_mask.shape[1]
        padded = nn.functional.pad(attention_mask, (0, max(missing, 0)))
        keys = padded[:, None, None, kv_offset : kv_offset + kv_length]
    everything = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return BandMask(
        (batch_size, 1, q_length, kv_length),
        band,
        None if keys is None or keys.all() else keys,
        None if sequences is None else _boundaries(sequences),
        partial(library.sdpa_mask, **arguments, **(kwargs | everything)),
        device,
    )


class BandMask(Tensor):
    """A bool mask (batch, 1, seqlen_q, seqlen_k), True = may attend, that is a band and perhaps a mask of keys, or
    a band within each of the sequences that are packed.

    It takes no memory. Any operation on it, a slice or a sum, sees the matrix, so that code that knows nothing of
    bands loses nothing.

    Attributes:
        band: which keys a query may see by position.
        keys: (1 or batch, 1, 1, seqlen_k) bool, True = may be attended; None = all.
        boundaries: (sequences + 1,) int32, where packed sequences begin and the last one ends, in the rows of the whole
            batch; None = nothing is packed.
        matrix: makes the mask as a matrix.
    """

    band: Mask
    keys: Tensor | None
    boundaries: Tensor | None
    matrix: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int, int, int],
        band: Mask,
        keys: Tensor | None,
        boundaries: Tensor | None,
        matrix: Callable[[], Tensor],
        device: torch.device | str,
    ) -> BandMask:
        mask: BandMask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        mask.band, mask.keys, mask.boundaries, mask.matrix = band, keys, boundaries, matrix
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as PyTorch advises

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, lambda mask: mask.matrix().contiguous(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _refusing_own_attention(check: Callable[..., str]) -> Callable[..., str]:
    """`PreTrainedModel.get_correct_attn_implementation`, and an error for classes that never call `attention_forward`.

    Such a class would take our masks and apply them as its own attention applies its own.
    """

    @wraps(check)
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        if requested_attention == NAME and not self._can_set_attn_implementation():
            raise ValueError(
                f"attn_implementation must be 'eager' for {type(self).__name__}, which computes attention in code of "
                f"its own, got {NAME!r}"
            )
        return check(self, requested_attention, is_init_check)

    return get_correct_attn_implementation


def _check_further_arguments(arguments: dict[str, Any]) -> None:
    if arguments.get("output_attentions"):
        raise NotImplementedError("output_attentions must be False: the probabilities are never in memory; use 'eager'")
    for name, what in _NOT_COMPUTED.items():
        if arguments.get(name) is not None:
            raise NotImplementedError(f"{name} must be None: {what} is not there in attn_implementation={NAME!r}")


def _sides(mask_function: Callable[..., Tensor], local_size: int | None) -> tuple[int | None, int | None] | None:
    """(left, right) of the band that a mask function of the library is, or None if it is not known to be one."""
    bands: list[tuple[Callable[..., Tensor], int | None, int | None]] = [
        (library.bidirectional_mask_function, None, None),
        (library.causal_mask_function, None, 0),
    ]
    if local_size is not None:
        bands.append((library.sliding_window_causal_mask_function(local_size), local_size - 1, 0))
        bands.append((library.sliding_window_bidirectional_mask_function(local_size), local_size, local_size))
    return next(((left, right) for known, left, right in bands if _alike(mask_function, known)), None)


def _unpacked(mask_function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], Tensor | None]:
    """(what a mask of packed sequences is within each, (batch, length) which sequence a position is of).

    Of another mask, or one that is not known to be one: itself, and None.
    """
    parts = _closed_over(mask_function, library.and_masks(library.causal_mask_function)).get("mask_functions", ())
    one = library.packed_sequence_mask_function(torch.empty(0))
    sequences = [_closed_over(part, one).get("packed_sequence_mask") for part in parts]
    others = [part for part, found in zip(parts, sequences, strict=True) if found is None]
    if len(parts) != 2 or len(others) != 1:
        return mask_function, None
    (within,) = others
    if hasattr(library, "remap_positions_for_packed_sequence"):  # to those in the sequence: a band is the same there
        remapped = library.remap_positions_for_packed_sequence(within, torch.empty(0))
        within = _closed_over(within, remapped).get("mask_function", within)
    return within, next(found for found in sequences if found is not None)


def _closed_over(function: object, known: FunctionType) -> dict[str, Any]:
    """What a function closes over, by name, if it comes from the same code as one that is known; else nothing."""
    if not isinstance(function, FunctionType) or function.__code__ is not known.__code__:
        return {}
    return dict(getclosurevars(function).nonlocals)


def _boundaries(sequences: Tensor) -> Tensor:
    """(sequences + 1,) int32: the rows of the batch where the number of the sequence, (batch, length), is another."""
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    return nn.functional.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=sequences.numel()).int()


def _all_boundaries(boundaries: Tensor | None, cu_seq_lens: Tensor | None, batch: int, seqlen: int) -> Tensor:
    """Where sequences begin in the rows of the batch: where the mask says so, and where `cu_seq_lens` does, which is
    about each batch entry. Where both do there is an empty sequence."""
    if cu_seq_lens is None:
        assert boundaries is not None  # one of the two is there
        return boundaries
    entries = seqlen * torch.arange(batch + 1, device=cu_seq_lens.device)
    begins = [entries, (entries[:-1, None] + cu_seq_lens.clamp(0, seqlen)).flatten()]
    return torch.cat(begins if boundaries is None else [*begins, boundaries]).sort().values.int()


def _alike(one: object, other: object) -> bool:
    """Whether two functions come from the same code and close over equal numbers and functions that are alike."""
    if one is other:
        return True
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        closures = (tuple(cell.cell_contents for cell in function.__closure__ or ()) for function in (one, other))
        return one.__code__ is other.__code__ and _alike(*closures)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return isinstance(one, int) and isinstance(other, int) and one == other


def _unexpanded(addend: Tensor) -> Tensor:
    """The same numbers, with size 1 along the axes that were only expanded: those are then not read again and again."""
    for axis in range(addend.dim()):
        if addend.stride(axis) == 0:
            addend = addend.narrow(axis, 0, 1)
    return addend


def _same_sequence(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """(seqlen_q, seqlen_k) bool: whether a query and a key are of the same packed sequence."""
    of_query, of_key = (
        torch.bucketize(torch.arange(length, device=ends.device), ends, right=True)
        for length, ends in ((seqlen_q, cu_seqlens_q), (seqlen_k, cu_seqlens_k))
    )
    return of_query[:, None] == of_key


def _sum(one: Tensor, other: Tensor | None) -> Tensor:
    """Both biases in one: bool masks hide what either hides, and hide it from an addend with -inf."""
    if other is None:
        return one
    if one.dtype == torch.bool and other.dtype == torch.bool:
        return one & other
    if one.dtype == torch.bool:
        return torch.where(one, other, -torch.inf)
    if other.dtype == torch.bool:
        return torch.where(other, one, -torch.inf)
    return one + other
