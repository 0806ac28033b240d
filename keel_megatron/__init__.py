"""Keel-Megatron: train very deep language models of the Keel kind on Megatron-core."""

import warnings

from keel_megatron.compat import late_compile

__version__ = "0.1.0"

# On import megatron-core warns, file by file, that the optional Apex and Transformer Engine are
# absent. They are optional here too.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core(\..*)?")

late_compile.install()
