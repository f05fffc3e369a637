"""Latent shards: parquet files of encoded pairs."""
