"""One process of a run: device, process groups, seeds, files, ownership, local launch."""
