"""From settings to objects: what a run needs is loaded here, once."""
