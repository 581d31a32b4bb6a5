"""What is checked before a bundle is used: its manifest, the files that it and its graphs name, and its signature."""
