"""Loading and naming of networks: a name -> ModelInfo (checked, without torch) -> Components (loaded)."""

from genkit.components.folder import inspect_model
from genkit.components.info import ModelInfo, Part, weight_hashes
from genkit.components.loading import Components, load_components

__all__ = ["Components", "ModelInfo", "Part", "inspect_model", "load_components", "weight_hashes"]
