"""Image inputs: image to image and inpainting."""
