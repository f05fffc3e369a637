"""Where a pipeline's parts come from: a diffusers pipeline object, a local folder, or a hub id.

Parts are looked at one by one, so that scoring latents never loads (or downloads) a text encoder.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from dina_lrm.errors import CheckpointError, InvalidInputError, MissingComponentError
from dina_lrm.pipelines.hub import download, is_hub_id
from dina_lrm.pipelines.weights import TensorSource, from_folder, from_module

BUNDLED = "bundled"
DENOISERS = ("transformer", "unet")
"""What a pipeline may call the network whose features are read."""


class PipelineSource:
    """Uniform access to the components of a pipeline.

    Args:
        pipeline: "bundled", a folder, a hub id, or a live diffusers pipeline (by reference, never changed).
        variant: weight files such as `diffusion_pytorch_model.fp16.safetensors`.
    """

    def __init__(self, pipeline: Any, *, variant: str | None = None, revision: str | None = None) -> None:
        self.variant = variant
        self.revision = revision
        self.live: Any = None
        self.folder: Path | None = None
        self._index: dict[str, Any] | None = None
        if isinstance(pipeline, str | Path):
            self.name = str(pipeline)
            self.folder = bundled_folder("pipeline") if self.name == BUNDLED else local_folder(pipeline)
        elif any(hasattr(pipeline, name) for name in DENOISERS):
            self.live = pipeline
            self.name = str(getattr(pipeline, "name_or_path", None) or type(pipeline).__name__)
        else:
            raise MissingComponentError(
                f"pipeline must be a diffusers pipeline with a transformer or unet, a folder or a hub id, "
                f"not {type(pipeline).__name__}"
            )

    def has(self, component: str) -> bool:
        """Is there such a component, without loading it?"""
        if self.live is not None:
            return getattr(self.live, component, None) is not None
        if self.folder is not None:
            return (self.folder / component).is_dir()
        return self.declares(component)

    def declares(self, component: str) -> bool:
        """Does model_index.json list the component as present?"""
        return any(self.model_index().get(component) or [None])

    def path(self, component: str) -> Path:
        """Local folder of a component, downloaded if the source is a hub id."""
        if self.folder is not None:
            if not (self.folder / component).is_dir():
                raise MissingComponentError(f"pipeline {self.name} has no {component}/ folder")
            return self.folder / component
        unwanted = ["*.bin", "*.msgpack", "*.onnx"]
        if self.variant is None:
            unwanted += ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*"]
        return download(self.name, [f"{component}/*"], unwanted, self.revision) / component

    def config(self, component: str, file: str) -> dict[str, Any]:
        """Configuration of a component, as a plain dict."""
        if self.live is not None:
            part = getattr(self.live, component, None)
            if part is None:
                raise MissingComponentError(f"pipeline {self.name} has no {component}")
            return {"_class_name": type(_unwrapped(part)).__name__, **dict(part.config)}
        if self.folder is None:  # the one file, without the weights beside it
            folder = download(self.name, [f"{component}/{file}"], None, self.revision)
            return read_json(folder / component / file)
        return read_json(self.path(component) / file)

    @property
    def denoiser(self) -> str:
        """Name of the component whose features are read: "transformer" or "unet"."""
        return "unet" if not self.has("transformer") and self.has("unet") else "transformer"

    @property
    def network(self) -> Any:
        """The live network itself; None unless the pipeline is live."""
        return None if self.live is None else _unwrapped(getattr(self.live, self.denoiser))

    def network_config(self) -> dict[str, Any]:
        """Configuration of the network whose features are read.

        Raises:
            InvalidInputError: the pipeline has a second network for other noise levels, or tells every token
                a timestep of its own (both: Wan 2.2), so that one network at one timestep is not what it
                computes.
        """
        second = f"{self.denoiser}_2"
        boundary = self._setting("boundary_ratio")
        if self.has(second) or boundary is not None:
            raise InvalidInputError(
                f"pipeline {self.name} has two networks, {self.denoiser} for high noise and {second} for low "
                f"(boundary_ratio = {boundary}), as Wan 2.2 does: a reward reads one network at every noise "
                f"level, so only pipelines with one are supported"
            )
        if self._setting("expand_timesteps"):
            raise InvalidInputError(
                f"pipeline {self.name} tells every token a timestep of its own (expand_timesteps), as Wan "
                f"2.2 TI2V does: only pipelines with one timestep for a latent are supported"
            )
        return self.config(self.denoiser, "config.json")

    def _setting(self, name: str) -> Any:
        """A setting of the pipeline itself; None where it has no such setting."""
        settings = self.model_index() if self.live is None else getattr(self.live, "config", {})
        return settings.get(name)

    def network_weights(self) -> TensorSource:
        if self.live is not None:
            return from_module(self.network, f"the {self.denoiser} of pipeline {self.name}")
        return from_folder(self.path(self.denoiser), self.variant)

    def model_index(self) -> dict[str, Any]:
        """model_index.json: the classes of all components; empty for a folder without one."""
        if self._index is None:
            if self.folder is None:
                folder = download(self.name, ["model_index.json"], None, self.revision)
            else:
                folder = self.folder
            file = folder / "model_index.json"
            self._index = read_json(file) if file.is_file() else {}
        return self._index


def _unwrapped(part: Any) -> Any:
    """The diffusers model inside what `torch.compile` or PEFT's `get_peft_model` put around it."""
    part = getattr(part, "_orig_mod", part)
    return part.get_base_model() if hasattr(part, "get_base_model") else part


def local_folder(location: str | Path) -> Path | None:
    """The folder, or None for something that can only be a hub id; anything else is an error."""
    path = Path(location).expanduser()
    if path.is_dir():
        return path
    if is_hub_id(location) and not path.exists():
        return None
    kind = "a file, not a folder" if path.exists() else "neither a folder nor a hub id like owner/name"
    raise MissingComponentError(f"{str(location)!r} is {kind}")


def bundled_folder(part: str) -> Path:
    """Folder of the weights shipped inside the package."""
    folder = Path(str(files("dina_lrm"))) / "shapes" / "weights" / part
    if not folder.is_dir():
        raise MissingComponentError(f"this installation carries no bundled {part} weights ({folder})")
    return folder


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; missing or damaged is a CheckpointError naming the file."""
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"missing file {file}") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value
