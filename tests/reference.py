"""Reference tensors of the paper's code: those of tests/golden, or of a folder that DINA_LRM_GOLDEN names."""

import os
from pathlib import Path

GOLDEN = Path(os.environ.get("DINA_LRM_GOLDEN", Path(__file__).parent / "golden"))
