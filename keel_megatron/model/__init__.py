"""The mathematics: residual rules, norm, attention, layer, specs, initialization."""
