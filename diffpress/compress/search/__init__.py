"""Search for a recipe under bounds: what can be chosen, how trials are proposed and measured, and their front."""
