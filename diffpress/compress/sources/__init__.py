"""Checkpoint loading: diffusers folders, hub ids, single files, LoRAs, custom modules."""
