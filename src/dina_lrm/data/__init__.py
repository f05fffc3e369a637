"""Preference data: rows of prompts and images (`own_rows`, `sources`), the same pairs as latents in memory
(`latents`), and on disk (`prepare`, `shards`)."""

from dina_lrm.data.encode import encode_pairs
from dina_lrm.data.latents import LatentPairs, PairBatch
from dina_lrm.data.order import batch_indices
from dina_lrm.data.pairs import PreferencePair, Reject, write_rejects
from dina_lrm.data.shards.read import LatentShards
from dina_lrm.data.sources.own_rows import PairRows, read_pairs

__all__ = [
    "LatentPairs",
    "LatentShards",
    "PairBatch",
    "PairRows",
    "PreferencePair",
    "Reject",
    "batch_indices",
    "encode_pairs",
    "read_pairs",
    "write_rejects",
]
