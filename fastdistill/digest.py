"""Digests: what a result came from, as a short text that changes with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from fastdistill.models.hooks import is_peft, uncompiled, unwrapped

if TYPE_CHECKING:
    from datasets import Dataset


def digest(pieces: Iterable[str | bytes | memoryview]) -> str:
    """XXH3, of 128 bits, of the pieces one after another: it tells what differs or is damaged, and takes a twelfth of
    the time of a cryptographic hash. It is none: whoever wants to can make two of the same."""
    hashed = xxhash.xxh3_128()
    for piece in pieces:
        hashed.update(piece.encode() if isinstance(piece, str) else piece)
    return hashed.hexdigest()


def tensor_pieces(tensors: Mapping[str, Tensor]) -> Iterator[str | memoryview]:
    """Names, types, shapes and values, in the names' order."""
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        plain = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
        yield plain.cpu().reshape(-1).view(torch.uint8).numpy().data


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Of a state, whose values may be packed, as PyTorch's quantized layers have them."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            yield from _tensors({f"{name}.{place}": one for place, one in enumerate(value)})


def row_pieces(rows: Dataset) -> Iterator[str | memoryview]:
    """Names, types and values of all columns, in whatever way they are kept; of images, and what else is in files that
    rows name, the files' bytes."""
    import pyarrow as pa
    from datasets.table import embed_table_storage

    for table in rows.with_format("arrow").iter(256):
        # taken, and so laid out anew: a slice's buffers may hold what is around it
        own = embed_table_storage(table).take(pa.array(range(len(table)))).combine_chunks()
        yield str(own.schema.remove_metadata())
        for batch in own.to_batches():
            yield memoryview(batch.serialize())


def model_digest(model: PreTrainedModel) -> str:
    """Of the model's weights, adapters, and what its config says beside where and by what it was written."""
    adapters = model.peft_config if is_peft(uncompiled(model)) else {}
    wrapped = [str(model.active_adapters), *map(str, adapters.items())] if adapters else []
    model = unwrapped(model)
    config = model.config.to_dict()
    for key in ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"):
        config.pop(key, None)
    described = json.dumps([type(model).__name__, config], sort_keys=True, default=str)
    return digest(chain([described, *wrapped], tensor_pieces(dict(_tensors(model.state_dict())))))
