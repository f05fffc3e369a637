"""Preference data: rows of prompts and images (`pairs`), and the same pairs as latents (`latents`)."""

from dina_lrm.data.latents import LatentPairs, PairBatch, batch_indices, encode_pairs
from dina_lrm.data.pairs import PairRows, PreferencePair, Reject, read_pairs, write_rejects

__all__ = [
    "LatentPairs",
    "PairBatch",
    "PairRows",
    "PreferencePair",
    "Reject",
    "batch_indices",
    "encode_pairs",
    "read_pairs",
    "write_rejects",
]
