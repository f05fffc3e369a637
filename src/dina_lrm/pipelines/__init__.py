"""What is read of a diffusers pipeline: its folder, object or hub id, its components and their weights."""
