"""Which reward is used, and where it runs: what every command and every bulk run are told."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dina_lrm.models.placement import resolve_device

if TYPE_CHECKING:
    import torch

    from dina_lrm.models.reward_model import RewardModel

__all__ = ["ModelOptions", "find_device"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A reward that is not loaded yet."""

    model: str = "bundled"
    """The reward: "bundled", a folder, or a hub id."""
    pipeline: str | None = None
    """The generator whose backbone is read: a folder or a hub id. By default the one the checkpoint names."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps and the like. By default the first GPU, and the CPU where there is none."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the backbone."""
    compile: bool = False
    """Compile blocks and head: the first score waits for it, the next ones are faster."""

    def load(self) -> "RewardModel":
        import torch

        from dina_lrm.models.reward_model import RewardModel

        device = find_device(self.device)
        # Only what was asked for is passed on: the defaults belong to from_pretrained.
        options: dict[str, Any] = {} if self.pipeline is None else {"pipeline": self.pipeline}
        return RewardModel.from_pretrained(
            self.model, device=device, dtype=getattr(torch, self.dtype), compile=self.compile, **options
        )


def find_device(name: str) -> "torch.device":
    """The device called `name`, or the best one for "auto".

    Raises:
        InvalidInputError: there is no such device.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = resolve_device(name)
    assert device is not None
    return device
