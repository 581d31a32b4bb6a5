"""LoRAs that are set and changed in an open bundle: files, names of layers, slots of the graph. Never torch."""
