"""Denoiser families (one adapter each) and the components around them: text encoders, autoencoders."""
