"""The errors a user can cause. Each message names the thing, the value met and what is allowed.

They also derive from the built-in a caller would guess (`ValueError`, `RuntimeError`), so that code which
does not know this package can still catch them.
"""

import warnings
from collections.abc import Iterable


class DinaError(Exception):
    """Base of every error raised on purpose by this package."""


class InvalidInputError(DinaError, ValueError):
    """A prompt, picture, latent, noise level or setting outside its allowed range."""


class CheckpointError(DinaError, ValueError):
    """A checkpoint that is incomplete, damaged, or made for another backbone."""


class MissingComponentError(DinaError, ValueError):
    """The pipeline at hand lacks the part (text encoder, VAE, scheduler) that the request needs."""


class RunError(DinaError, RuntimeError):
    """A run that failed, though settings and input were in order: training that diverged, a dead process."""


class HubError(RunError):
    """What could not be sent to the hub or read from it: no token, no permission, no network."""


class UntrainedModelError(DinaError, RuntimeError):
    """A request to score with weights that were never trained."""


class ScoringError(RunError):
    """No score, or none that means anything: no server, one that breaks the protocol, a number not finite."""


class PromptWarning(UserWarning):
    """A prompt was used, but not all of it reached the encoder: words cut off, or words it does not know."""


def warn_of_prompts(notes: Iterable[str], *, stacklevel: int = 5) -> None:
    """A PromptWarning for each note, each once."""
    for note in dict.fromkeys(notes):
        warnings.warn(note, PromptWarning, stacklevel=stacklevel)
