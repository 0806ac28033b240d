"""The model: residual rules, norm, attention, layer, specs, initialization."""
