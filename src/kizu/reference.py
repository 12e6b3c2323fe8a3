"""`kizu.reference.models` of 0.1 is `kizu.export.reference_files`; this name for it goes with the next release."""

import sys

from kizu.export import reference_files as models

__path__: list[str] = []
sys.modules[f"{__name__}.models"] = models
