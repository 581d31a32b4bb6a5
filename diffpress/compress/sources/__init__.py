"""What a user may name as input: diffusers folders, hub ids, single files, LoRAs, custom modules."""
